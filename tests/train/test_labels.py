"""Rewards stand beside the responses of a collection, and say what they could not judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from collected import CONFIG, PROMPTS, Killed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastguide import Engine
from fastguide.kernels.reference import td_lambda
from fastguide.rewards import FunctionReward, Sample, load_reward
from fastguide.train.collect import collect, failures, read
from fastguide.train.episodes import Episode, Rollout, collate, episodes_of, mean_return
from fastguide.train.labels import label, load_episodes, sample_of
from fastguide.train.shards import Shards


def test_rewards_stand_beside_the_responses(engine: Engine, folder: Path) -> None:

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
    with pytest.raises(
        ValueError, match="'brevity' is -6 for all 10 responses"
    ):  # all have 6 tokens
        load_episodes(folder, "brevity")
    with pytest.raises(ValueError, match=r"'brevity' in .* has reward 'brevity', not 'length'"):
        label(folder, load_reward("length"), decode, name="brevity")
    with pytest.raises(ValueError, match="has no 'joy'; it has both, brevity, reward, rollouts"):
        load_episodes(folder, "joy")


def test_killed_labelling_goes_on_where_it_was(folder: Path) -> None:
    judged = []

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
    from fastguide.train.labels import judged

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


def test_failures_count_against_all_samples(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastguide.rewards.base.MOST_FAILURES", 0.1)
    responses = [" ".join(map(str, rollout.response_ids)) for rollout in read(folder)]
    first, *_, last = [i for i, one in enumerate(responses) if responses.count(one) == 1]
    assert first < 8  # in a shard of four
    assert last == 9  # in the last, of two

    def decode(ids: Sequence[int]) -> str:
        return "".join(f" {i}" for i in ids)

    def reward(*failing: int) -> FunctionReward:
        texts = [responses[i] for i in failing]

        def opinion(prompt: str, response: str) -> float:
            if response.strip() in texts:
                raise RuntimeError("no opinion")
            return 0.0

        return FunctionReward(opinion)

    # One of the two in the last shard, but one of ten in all.
    assert failures(label(folder, reward(last), decode, name="one"), "one") == 1
    said = r"failed on 2 of 10 samples .* first on prompt \d, sample \d: RuntimeError: no"
    with pytest.raises(ValueError, match=said):
        label(folder, reward(first, last), decode, name="two")
    assert list(Shards(folder).series["two"]["shards"]) == ["0", "1"]  # what was judged is kept


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
    assert [(e.reward, e.token_reward) for e in episodes] == [(0.0, -2.0)] * 2
    episodes, _ = episodes_of(rollouts, [0.9, -0.1, None], "joy", max_tokens=3)
    assert [(e.reward, e.token_reward) for e in episodes] == [(1.0, 0.0), (-1.0, 0.0)]
    with pytest.raises(ValueError, match="'joy' is 1 for all 3 responses"):
        episodes_of(rollouts, [1.0, 1.0, 1.0], "joy")


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_mean_return_is_that_of_all_states(gamma: float) -> None:
    episodes = [Episode((1, 2), (3, 4, 5), 2.0, token_reward=-0.5), Episode((1,), (), 3.0)]
    batch = collate(episodes)
    returns = td_lambda(torch.zeros(2, 5), batch.rewards, batch.states, gamma, 1.0)
    assert mean_return(episodes, gamma) == pytest.approx(returns[batch.states].mean().item())


def test_samples_say_how_many_tokens_they_have() -> None:
    assert load_reward("length")([Sample("p", "r", 5)]) == [5.0]


def test_sums_are_read_back_from_their_series(engine: Engine, folder: Path) -> None:
    reward = load_reward(["cheerfulness", "0.0123456789*brevity", "-1e-9*regex:a + b"])
    label(folder, reward, engine.tokenizer.decode)
    again = load_reward(Shards(folder).series["reward"]["about"]["spec"])
    assert again.name == reward.name
    samples = [Sample("", "A cat. a   b", 3)]
    assert again(samples) == reward(samples)


def test_responses_are_read_after_their_prompt() -> None:
    """Tokenizers of the sentencepiece kind drop the space that a text begins with."""
    words = {"<unk>": 0, "▁Once": 1, "▁upon": 2, "▁a": 3, "▁time": 4}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([3, 4]) == "a time"
    sample = sample_of(Rollout(0, 0, (1, 2), (), "stop"), [3, 4], tokenizer.decode)
    assert sample == Sample("Once upon", " a time", 2)


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
