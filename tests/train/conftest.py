"""Fixtures: an engine on the packaged model, and a collection of its responses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from collected import CONFIG, PROMPTS

from fastguide import Engine
from fastguide.train.collect import collect


@pytest.fixture(scope="package")
def engine() -> Engine:
    """The packaged model in float32, without guides."""
    return Engine("stories", guides={}, dtype="float32", device="cpu")


@pytest.fixture(scope="package")
def whole(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished collection that no test writes to."""
    folder = tmp_path_factory.mktemp("whole")
    collect(engine, PROMPTS, folder, CONFIG, policy="stories")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of ``whole``, the test's own."""
    return Path(shutil.copytree(whole, tmp_path, dirs_exist_ok=True))
