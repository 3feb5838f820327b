"""The Ray pipeline, with two workers on this machine, makes what a single process makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastguide import Engine
from fastguide.rewards import load_reward
from fastguide.train.collect import CollectConfig, collect
from fastguide.train.labels import label
from fastguide.train.ray_data import collect_with_ray, label_with_ray

ray: Any = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.slow

CONFIG = CollectConfig(samples_per_prompt=2, max_tokens=6, shard_prompts=2, seed=3)
PROMPTS = [[0, 424, 439], [0, 424], [0, 323, 447, 442], [0, 424, 439], [0, 281]]
TEXTS = ["One", "Two;", "Three", "Four", "Five, six"]
OPTIONS = {"dtype": "float32"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.shutdown()  # of whoever used it before
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_two_workers_make_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastguide.train.ray_data.SHARDS_AT_ONCE", 2)
    engine = Engine("stories", guides={}, device="cpu", **OPTIONS)
    alone = tmp_path / "alone"
    collect(engine, PROMPTS, alone, CONFIG, policy=engine.policy, texts=TEXTS)
    decode = engine.tokenizer
    reward = load_reward(["cheerfulness", "0.1*length"])
    label(alone, reward, lambda ids: decode.decode(list(ids), skip_special_tokens=True))

    shared, told = tmp_path / "shared", []
    # Begun by one process, killed after a shard, and continued by two.
    begun = {"policy": engine.policy, "texts": TEXTS, "on_progress": _kill}
    with pytest.raises(KeyboardInterrupt):
        collect(engine, PROMPTS, shared, CONFIG, **begun)
    shards = collect_with_ray(
        "stories",
        PROMPTS,
        shared,
        CONFIG,
        texts=TEXTS,
        workers=2,
        options=OPTIONS,
        on_progress=lambda done, of: told.append((done, of)),
    )
    assert told[-1] == (10, 10)
    assert told[0][0] >= 4 + 2
    shards = label_with_ray(shared, ["cheerfulness", "0.1*length"], "stories", workers=2)
    assert {f.name for f in shared.iterdir()} == {f.name for f in alone.iterdir()}
    for file in alone.iterdir():
        assert (shared / file.name).read_bytes() == file.read_bytes(), file.name
    assert shards.complete("reward")


def _kill(done: int, of: int) -> None:
    if done > 4:
        raise KeyboardInterrupt
