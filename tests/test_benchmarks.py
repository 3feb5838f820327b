"""The benchmarks run: as commands, and as cases of pytest-benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLI = [sys.executable, "-m", "fastguide.cli"]


def test_an_unknown_benchmark_is_one_sentence() -> None:
    done = subprocess.run([*CLI, "bench", "speed"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: benchmark is 'speed'; allowed are engine, ops, train, ways\n"


@pytest.mark.slow
def test_bench_ops_prints_a_table_and_keeps_a_record(tmp_path: Path) -> None:
    command = [*CLI, "bench", "ops", "--op", "td", "--rounds", "2"]
    record = tmp_path / "ops.json"
    done = subprocess.run(
        [*command, "--save", str(record)], capture_output=True, text=True, check=True
    )
    assert "td_lambda" in done.stdout
    results = json.loads(record.read_text())["results"]
    assert {r["op"] for r in results} == {"td_lambda"}
    assert all(r["speedup"] > 0 and r["runs"]["fastguide"]["ms"] > 0 for r in results)


@pytest.mark.slow
def test_every_case_runs_under_pytest_benchmark() -> None:
    """Each case is checked against the reference and called once."""
    pytest_script = Path(sys.executable).with_name("pytest")  # python -m would add the root
    command = [pytest_script, "benchmarks", "--benchmark-disable", "-q"]
    small = ["-k", "td or lora or (attention and 128) or (topk and -1-)"]
    done = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
