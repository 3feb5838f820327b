"""A killed collection continues: nothing is lost, nothing is there twice; rewards stand beside."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastguide import Engine
from fastguide.kernels.reference import td_lambda
from fastguide.models.loading import load_tokenizer
from fastguide.rewards import FunctionReward, Sample, load_reward
from fastguide.train.collect import (
    CollectConfig,
    check_tokenizer,
    collect,
    failures,
    label,
    load_episodes,
    read,
    sample_of,
)
from fastguide.train.episodes import Rollout, collate, episodes_of
from fastguide.train.shards import MANIFEST_FILE, Shards

CONFIG = CollectConfig(samples_per_prompt=2, max_tokens=6, shard_prompts=2, seed=3)
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


def copy(whole: Path, folder: Path) -> Path:
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


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


def test_a_finished_folder_is_left_alone(engine: Engine, whole: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in whole.iterdir()}
    collect(engine, PROMPTS, whole, CONFIG, policy="stories")
    assert {f: f.stat().st_mtime_ns for f in whole.iterdir()} == before


def test_other_settings_are_refused(engine: Engine, whole: Path) -> None:
    with pytest.raises(ValueError, match="rollouts with another prompts;"):
        collect(engine, PROMPTS[:3], whole, CONFIG, policy="stories")
    with pytest.raises(ValueError, match="rollouts with another policy;"):
        collect(engine, PROMPTS, whole, CONFIG, policy="others")


def test_a_changed_shard_is_noticed(whole: Path, tmp_path: Path) -> None:
    copy(whole, tmp_path)
    (tmp_path / "rollouts-00001.parquet").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"rollouts-00001\.parquet is missing or not what was"):
        list(read(tmp_path))
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
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


# ------------------------------------------------------------------------------------ rewards


def test_rewards_stand_beside_the_responses(engine: Engine, whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)

    def decode(ids: Sequence[int]) -> str:
        return str(engine.tokenizer.decode(ids, skip_special_tokens=True))

    told = []
    label(
        folder,
        load_reward("vader"),
        decode,
        max_tokens=4,
        on_progress=lambda done, of: told.append((done, of)),
    )
    label(folder, load_reward(["vader", "length"]), decode, name="both")
    label(folder, load_reward("brevity"), decode, name="brevity")
    assert told == [(4, 10), (8, 10), (10, 10)]
    rows = list(Shards(folder).rows("reward"))
    rollouts = list(read(folder))
    assert [row["response"] for row in rows] == [decode(r.response_ids[:4]) for r in rollouts]
    episodes, scale = load_episodes(folder, "both")
    assert (scale.name, scale.per_token) == ("1*vader + 1*length", False)
    assert [len(e.response_ids) for e in episodes] == [len(r.response_ids) for r in rollouts]
    with pytest.raises(ValueError, match="'brevity' must vary"):  # all have 6 tokens
        load_episodes(folder, "brevity")
    with pytest.raises(ValueError, match=r"'brevity' in .* has reward 'brevity', not 'length'"):
        label(folder, load_reward("length"), decode, name="brevity")
    with pytest.raises(ValueError, match="has no 'joy'; it has both, brevity, reward, rollouts"):
        load_episodes(folder, "joy")


def test_killed_labelling_goes_on_where_it_was(whole: Path, tmp_path: Path) -> None:
    folder, judged = copy(whole, tmp_path), []

    def reward(prompt: str, response: str) -> float:
        judged.append(response)
        return len(response)

    def kill(done: int, of: int) -> None:
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        label(folder, FunctionReward(reward), str, on_progress=kill)
    with pytest.raises(ValueError, match=r"'reward' in .* are unfinished"):
        load_episodes(folder)
    shards = label(folder, FunctionReward(reward), str)
    assert len(judged) == 10
    assert failures(shards, "reward") == 0


def test_a_sample_that_cannot_be_judged_is_left_out(tmp_path: Path) -> None:
    from fastguide.train.collect import judged

    rollouts = [Rollout(i, 0, (1,), (2, i), "stop") for i in range(40)]

    def reward(prompt: str, response: str) -> float:
        if response == " 2 7":
            raise RuntimeError("no opinion")
        return float("nan") if response == " 2 9" else len(response)

    def decode(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    table, failed = judged(rollouts, FunctionReward(reward), decode, None)
    assert failed == [
        "prompt 7, sample 0: RuntimeError: no opinion",
        "prompt 9, sample 0: the reward is nan",
    ]
    rows = table.to_pylist()
    assert [i for i, row in enumerate(rows) if row["reward"] is None] == [7, 9]
    assert rows[7]["failure"] == "RuntimeError: no opinion"
    assert rows[9]["failure"] == "the reward is nan"
    with pytest.raises(ValueError, match=r"failed on 2 of 10 .* prompt 7, sample 0: RuntimeError"):
        judged(rollouts[:10], FunctionReward(reward), decode, None)


def test_episodes_are_cut_and_standardised() -> None:
    rollouts = [
        Rollout(0, 0, (1, 2), (3, 4, 5, 6), "length"),
        Rollout(1, 0, (1,), (3, 0), "stop"),
        Rollout(2, 0, (1,), (9, 9), "stop"),
    ]
    episodes, scale = episodes_of(
        rollouts, [-3.0, -2.0, None], "brevity", max_tokens=3, per_token=-1.0
    )
    assert [len(e.response_ids) for e in episodes] == [3, 2]
    assert (scale.mean, scale.std, scale.per_token) == (-2.5, 0.5, True)
    # Paid per token, 1 / std each; what is still to come is 0 in the mean over all states.
    assert [e.token_reward for e in episodes] == [-2.0, -2.0]
    batch = collate(episodes)
    left = td_lambda(torch.zeros(2, 5), batch.rewards, batch.states, 1.0, 1.0)
    assert left.sum().item() == pytest.approx(0.0, abs=1e-5)
    assert left[0, 1].item() - left[1, 0].item() == pytest.approx(-2.0)  # 3 tokens, not 2
    episodes, _ = episodes_of(rollouts, [0.9, -0.1, None], "joy", max_tokens=3)
    assert [(e.reward, e.token_reward) for e in episodes] == [(1.0, 0.0), (-1.0, 0.0)]
    with pytest.raises(ValueError, match="'joy' must vary"):
        episodes_of(rollouts, [1.0, 1.0, 1.0], "joy")


def test_samples_say_how_many_tokens_they_have() -> None:
    assert load_reward("length")([Sample("p", "r", 5)]) == [5.0]


def test_two_who_write_one_folder_lose_nothing(engine: Engine, whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    one, other = Shards(folder), Shards(folder)
    for shards, name in ((one, "one"), (other, "two")):
        shards.begin(name, of=1, reward=name)
    table = one.read("rollouts", 0)
    one.write("one", 0, table)
    other.write("two", 0, table)
    assert {"rollouts", "one", "two"} == set(Shards(folder).series)
    assert Shards(folder).complete("one")


def test_what_was_begun_in_vain_can_be_begun_otherwise(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    with pytest.raises(ValueError, match="failed on 4 of 4 samples"):
        label(folder, load_reward("checker:./nowhere-at-all"), str, name="right")
    label(folder, load_reward("length"), str, name="right")
    with pytest.raises(ValueError, match=r"'right' in .* has reward 'length', not 'vader'"):
        label(folder, load_reward("vader"), str, name="right")


def test_another_series_is_no_other_data(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    label(folder, load_reward("length"), str)
    before = Shards(folder).digest("rollouts", "reward")
    label(folder, load_reward("vader"), str, name="more")
    assert Shards(folder).digest("rollouts", "reward") == before
    assert Shards(folder).digest("rollouts", "more") != before


def test_sums_are_read_back_from_their_series(engine: Engine, whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    reward = load_reward(["cheerfulness", "0.0123456789*brevity", "-1e-9*regex:a + b"])
    label(folder, reward, engine.tokenizer.decode)
    again = load_reward(Shards(folder).series["reward"]["about"]["spec"])
    assert again.name == reward.name
    samples = [Sample("", "A cat. a   b", 3)]
    assert again(samples) == reward(samples)


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


def test_responses_are_read_after_their_prompt() -> None:
    """Tokenizers of the sentencepiece kind drop the space that a text begins with."""
    words = {"<unk>": 0, "▁Once": 1, "▁upon": 2, "▁a": 3, "▁time": 4}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([3, 4]) == "a time"
    sample = sample_of(Rollout(0, 0, (1, 2), (), "stop"), [3, 4], tokenizer.decode)
    assert sample == Sample("Once upon", " a time", 2)


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


def test_rewards_read_what_was_said_without_the_chat_template(
    engine: Engine, tmp_path: Path
) -> None:
    """Shards made with texts and without them are read alike."""
    prompts, texts = PROMPTS[:3], ["One", "Two", "Three"]
    shards = collect(engine, prompts, tmp_path / "a", CONFIG, policy="stories", texts=texts)
    seen: list[Sample] = []

    def reward(samples: Sequence[Sample]) -> list[float]:
        seen.extend(samples)
        return [float(i) for i in range(len(samples))]

    label(shards.folder, _Named(reward), lambda ids: "x" * len(ids))
    assert [s.prompt for s in seen] == ["One", "One", "Two", "Two", "Three", "Three"]
    with pytest.raises(ValueError, match="prompts"):  # a folder is not continued with others
        collect(engine, prompts, tmp_path / "a", CONFIG, policy="stories")
    plain = collect(engine, prompts, tmp_path / "b", CONFIG, policy="stories")
    assert [r.response_ids for r in read(plain.folder)] == [
        r.response_ids for r in read(shards.folder)
    ]
    seen.clear()
    label(plain.folder, _Named(reward), lambda ids: "x" * len(ids))
    assert [len(s.prompt) for s in seen] == [3, 3, 2, 2, 4, 4]


@dataclasses.dataclass
class _Named:
    """A reward of all samples at once."""

    judge: Callable[[Sequence[Sample]], list[float]]
    name: str = "mine"
    per_token: float = 0.0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return self.judge(samples)
