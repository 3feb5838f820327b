"""A killed collection continues: nothing is lost, nothing is there twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastguide import Engine
from fastguide.train.rollouts import MANIFEST_FILE, RolloutConfig, collect, read

CONFIG = RolloutConfig(samples_per_prompt=2, max_tokens=6, shard_prompts=2, seed=3)
PROMPTS = [[0, 424, 439], [0, 424], [0, 323, 447, 442], [0, 424, 439], [0, 281]]


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("stories", guides={}, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def whole(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    collect(engine, PROMPTS, folder, CONFIG, policy="stories")
    return folder


def test_every_prompt_gets_its_samples_in_order(whole: Path) -> None:
    rollouts = list(read(whole))
    assert [(r.prompt, r.sample) for r in rollouts] == [(p, s) for p in range(5) for s in range(2)]
    assert [r.prompt_ids for r in rollouts[::2]] == [tuple(p) for p in PROMPTS]
    for rollout in rollouts:
        assert len(rollout.response_ids) == 6 or rollout.finish_reason == "stop"
    # Equal prompts draw with different seeds.
    assert rollouts[0].response_ids != rollouts[6].response_ids


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_kill_and_resume_equals_an_uninterrupted_run(
    engine: Engine, whole: Path, tmp_path: Path, shards: int
) -> None:
    def kill(done: int, of: int) -> None:
        if done == shards:
            raise Killed

    if shards:
        with pytest.raises(Killed):
            collect(engine, PROMPTS, tmp_path, CONFIG, policy="stories", on_shard=kill)
        with pytest.raises(ValueError, match="unfinished"):
            list(read(tmp_path))
    # A shard half written, and one written but not yet in the manifest, are as good as none.
    (tmp_path / f"shard-{shards:05d}.jsonl.gz").write_bytes(b"half")
    (tmp_path / f"shard-{shards:05d}.jsonl.gz.part").write_bytes(b"half")
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.glob("shard-*.gz")}
    collect(engine, PROMPTS, tmp_path, CONFIG, policy="stories")
    assert list(read(tmp_path)) == list(read(whole))
    remade = [f.name for f, time in kept.items() if f.stat().st_mtime_ns != time]
    assert remade == [f"shard-{shards:05d}.jsonl.gz"]


def test_a_finished_folder_is_left_alone(engine: Engine, whole: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in whole.iterdir()}
    collect(engine, PROMPTS, whole, CONFIG, policy="stories")
    assert {f: f.stat().st_mtime_ns for f in whole.iterdir()} == before


def test_other_settings_are_refused(engine: Engine, whole: Path) -> None:
    with pytest.raises(ValueError, match="other prompts, settings or policy"):
        collect(engine, PROMPTS[:3], whole, CONFIG, policy="stories")


def test_a_changed_shard_is_noticed(engine: Engine, whole: Path, tmp_path: Path) -> None:
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "shard-00001.jsonl.gz").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"shard-00001\.jsonl\.gz is missing or not what was"):
        list(read(tmp_path))
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert [facts["rollouts"] for facts in manifest["shards"].values()] == [4, 4, 2]
