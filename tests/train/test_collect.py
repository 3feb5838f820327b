"""A killed collection continues: nothing is lost, nothing is there twice; rewards stand beside."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from collected import CONFIG, PROMPTS, Killed

from fastguide import Engine
from fastguide.models.loading import load_tokenizer
from fastguide.rewards import load_reward
from fastguide.train.collect import CollectConfig, check_tokenizer, collect, failures, kept, read
from fastguide.train.labels import label, load_episodes
from fastguide.train.shards import MANIFEST_FILE, Shards

# --------------------------------------------------------------------------------- responses


def test_every_prompt_gets_its_samples_in_order(whole: Path) -> None:
    rollouts = list(read(whole))
    assert [(r.prompt, r.sample) for r in rollouts] == [(p, s) for p in range(5) for s in range(2)]
    assert [r.prompt_ids for r in rollouts[::2]] == [tuple(p) for p in PROMPTS]
    for rollout in rollouts:
        assert len(rollout.response_ids) == 6 or rollout.finish_reason == "stop"
    # Equal prompts draw with different seeds.
    assert rollouts[0].response_ids != rollouts[6].response_ids


def test_prompts_that_cannot_be_continued_are_left_out(engine: Engine, tmp_path: Path) -> None:
    """Their neighbours' responses are those they have without them."""
    long, full = [5] * 1024, [5] * 1023
    prompts = [[0, 424], long, full, *([0, 323 + i] for i in range(57))]
    config = CollectConfig(samples_per_prompt=2, max_tokens=3, shard_prompts=2, seed=3)
    shards = collect(engine, prompts, tmp_path / "all", config, policy="stories")
    found = list(read(shards.folder))
    assert [r.prompt for r in found[::2]] == [0, *range(2, 60)]
    assert failures(shards, "rollouts") == 2
    assert [(len(r.response_ids), r.finish_reason) for r in found[2:4]] == [(1, "length")] * 2
    alone = collect(engine, prompts[:1], tmp_path / "alone", config, policy="stories")
    assert list(read(alone.folder)) == found[:2]
    label(shards.folder, load_reward("length"), lambda ids: "x" * len(ids))
    assert len(load_episodes(shards.folder)[0]) == 118


def test_a_collection_of_unusable_prompts_does_not_begin(engine: Engine, tmp_path: Path) -> None:
    said = "1 of 2 prompts cannot be continued .* first prompt 1: it has 0 tokens; allowed are 1 to"
    with pytest.raises(ValueError, match=said):
        collect(engine, [[0, 424], []], tmp_path / "data", CONFIG, policy="stories")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("responses", [0, 1, 4, 7, 9])
def test_kill_and_resume_equals_an_uninterrupted_run(
    engine: Engine, whole: Path, tmp_path: Path, responses: int
) -> None:
    def kill(done: int, of: int) -> None:
        assert of == 10
        if done > responses:
            raise Killed

    with pytest.raises(Killed):
        collect(engine, PROMPTS, tmp_path, CONFIG, policy="stories", on_progress=kill)
    with pytest.raises(ValueError, match="unfinished"):
        list(read(tmp_path))
    # A shard half written, and one written but not yet in the manifest, are as good as none.
    shards = responses // 4
    (tmp_path / f"rollouts-{shards:05d}.parquet").write_bytes(b"half")
    (tmp_path / f"rollouts-{shards:05d}.parquet.part").write_bytes(b"half")
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.glob("rollouts-*.parquet")}
    collect(engine, PROMPTS, tmp_path, CONFIG, policy="stories")
    remade = [f.name for f, time in kept.items() if f.stat().st_mtime_ns != time]
    assert remade == [f"rollouts-{shards:05d}.parquet"]
    for file in whole.glob("rollouts-*"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert Shards(tmp_path).digest() == Shards(whole).digest()


def test_what_is_finished_of_a_shard_is_not_sampled_again(tmp_path: Path) -> None:
    """Killed in the middle of a line, too."""
    engine = Engine("stories", guides={}, dtype="float32", device="cpu", max_rows=1)
    config = dataclasses.replace(CONFIG, shard_prompts=5)
    collect(engine, PROMPTS, tmp_path / "whole", config, policy="stories")

    def kill(done: int, of: int) -> None:
        if done == 7:  # three prompts have both of their responses, the fourth has one
            raise Killed

    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        collect(engine, PROMPTS, folder, config, policy="stories", on_progress=kill)
    draft = folder / "rollouts-00000.draft.jsonl"
    draft.write_bytes(draft.read_bytes()[:-9])
    assert kept(Shards(folder)) == 4
    other = dataclasses.replace(config, temperature=0.5)
    with pytest.raises(ValueError, match=r"rollouts with temperature 0.7, not 0.5; choose"):
        collect(engine, PROMPTS, folder, other, policy="stories")
    told: list[int] = []
    shards = collect(
        engine, PROMPTS, folder, config, policy="stories", on_progress=lambda n, _: told.append(n)
    )
    assert told == [5, 6, 7, 8, 9, 10, 10]
    assert list(read(folder)) == list(read(tmp_path / "whole"))
    assert {f.name for f in folder.iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}
    assert kept(shards) == 10


def test_ctrl_c_keeps_no_response_that_is_cut_short(
    engine: Engine, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = engine.runner.step, []

    def interrupted(rows: Any) -> Any:
        steps.append(len(rows))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(rows)

    monkeypatch.setattr(engine.runner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(engine, PROMPTS, tmp_path, CONFIG, policy="stories")
    monkeypatch.undo()
    collect(engine, PROMPTS, tmp_path, CONFIG, policy="stories")
    assert list(read(tmp_path)) == list(read(whole))


def test_a_finished_folder_is_left_alone(engine: Engine, whole: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in whole.iterdir()}
    collect(engine, PROMPTS, whole, CONFIG, policy="stories")
    assert {f: f.stat().st_mtime_ns for f in whole.iterdir()} == before


def test_other_settings_are_refused(engine: Engine, whole: Path) -> None:
    with pytest.raises(ValueError, match="rollouts with another prompts;"):
        collect(engine, PROMPTS[:3], whole, CONFIG, policy="stories")
    with pytest.raises(ValueError, match="rollouts with policy 'stories', not 'others';"):
        collect(engine, PROMPTS, whole, CONFIG, policy="others")


def test_a_changed_shard_is_noticed(folder: Path) -> None:
    (folder / "rollouts-00001.parquet").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"rollouts-00001\.parquet is missing or not what was"):
        list(read(folder))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    shards = manifest["series"]["rollouts"]["shards"]
    assert [facts["rows"] for facts in shards.values()] == [4, 4, 2]


def test_missing_pyarrow_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'fastguide\[train\]'"):
        Shards(tmp_path, {})


def test_a_folder_without_rollouts_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no rollouts at .*: manifest.json is missing"):
        list(read(tmp_path))


def test_two_who_write_one_folder_lose_nothing(folder: Path) -> None:
    one, other = Shards(folder), Shards(folder)
    for shards, name in ((one, "one"), (other, "two")):
        shards.begin(name, of=1, reward=name)
    table = one.read("rollouts", 0)
    one.write("one", 0, table)
    other.write("two", 0, table)
    assert {"rollouts", "one", "two"} == set(Shards(folder).series)
    assert Shards(folder).complete("one")


def test_what_was_begun_in_vain_can_be_begun_otherwise(folder: Path) -> None:
    with pytest.raises(ValueError, match="failed on 4 of 10 samples"):
        label(folder, load_reward("checker:./nowhere-at-all"), str, name="right")
    label(folder, load_reward("length"), str, name="right")
    with pytest.raises(ValueError, match=r"'right' in .* has reward 'length', not 'vader'"):
        label(folder, load_reward("vader"), str, name="right")


def test_another_series_is_no_other_data(folder: Path) -> None:
    label(folder, load_reward("length"), str)
    before = Shards(folder).digest("rollouts", "reward")
    label(folder, load_reward("vader"), str, name="more")
    assert Shards(folder).digest("rollouts", "reward") == before
    assert Shards(folder).digest("rollouts", "more") != before


def test_another_tokenizer_is_refused(whole: Path, tmp_path: Path) -> None:
    other = Path("../shared/models/stories260k")
    if not other.is_dir():
        pytest.skip("shared/models is absent")
    shards = Shards(whole)
    assert shards.notes["model"] == "stories"
    with pytest.raises(ValueError, match=r"is of 'stories', and .*stories260k' has another token"):
        check_tokenizer(shards, str(other), load_tokenizer(other))


@pytest.mark.parametrize("temperature", [-1.0, 0.0, float("nan")])
def test_wrong_temperatures_are_refused_before_anything_is_written(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature is .*; allowed are numbers above 0"):
        CollectConfig(temperature=temperature)


def test_a_folder_without_a_shard_is_no_collection_yet(engine: Engine, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, of: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        collect(engine, PROMPTS, tmp_path, CONFIG, policy="stories", on_progress=stop)
    other = dataclasses.replace(CONFIG, seed=9)
    collect(engine, PROMPTS, tmp_path, other, policy="stories")
    assert Shards(tmp_path).about["sampling"]["seed"] == 9
