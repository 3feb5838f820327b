"""Fixtures: an engine on the packaged model, and a collection of its responses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from collected import CONFIG, PROMPTS

from fastguide import Engine
from fastguide.engine.text import decoder
from fastguide.rewards import load_reward
from fastguide.train.collect import CollectConfig, collect
from fastguide.train.labels import label

STARTS = ["Once upon a time", "Tom had a red ball.", "Lily was sad.", "The dog ran", "One day"]
NAMES = ["Ann", "Ben", "Sue", "Max", "Mia", "Sam"]


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


@pytest.fixture(scope="package")
def decode(engine: Engine) -> Callable[[Sequence[int]], str]:
    """Token ids to text."""
    return decoder(engine.tokenizer)


@pytest.fixture(scope="package")
def data(engine: Engine, decode: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a judged collection that no test writes to."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{start} {name}" for start in STARTS for name in NAMES]
    config = CollectConfig(samples_per_prompt=3, max_tokens=20, shard_prompts=16, seed=1)
    ids = engine.tokenizer(texts).input_ids
    collect(engine, ids, folder, config, policy=engine.policy)
    label(folder, load_reward("cheerfulness"), decode)
    label(folder, load_reward("brevity"), decode, name="brevity", max_tokens=12)
    return folder
