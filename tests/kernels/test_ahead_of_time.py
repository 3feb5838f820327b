"""The Triton kernels compile for every supported GPU, where there is none: no hot one spills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastguide.kernels import triton

pytestmark = pytest.mark.skipif(not triton.available(), reason="triton is not installed")


def compile_all(folder: Path, *options: str) -> None:
    """In a process of its own: this one may have the kernels interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")  # compile, do not remember
    command = [sys.executable, "-m", "fastguide.kernels.triton.ahead", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_kernels_that_matter_most_compile(tmp_path: Path) -> None:
    compile_all(tmp_path, "--sm", "80", "90", "100")


@pytest.mark.slow
def test_every_kind_of_launch_compiles(tmp_path: Path) -> None:
    """For one GPU, as it takes minutes; others differ only in what the kernels become."""
    compile_all(tmp_path, "--every", "--sm", "90")
