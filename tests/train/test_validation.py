"""Monte-Carlo validation: what prefixes are worth, and which guides a set can measure."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from small import settings

from fastguide import Engine
from fastguide.kernels.reference import td_lambda
from fastguide.models.guide_config import GuideConfig, RewardScale
from fastguide.models.value import ValueModel
from fastguide.rewards import cheerfulness, load_reward
from fastguide.train.collect import read
from fastguide.train.episodes import Rollout, collate, episodes_of
from fastguide.train.fudge import FudgeConfig
from fastguide.train.guides import train_guide
from fastguide.train.labels import load_episodes
from fastguide.train.shards import Shards
from fastguide.train.validation import (
    LABELS,
    _discounted,
    labels,
    make_validation,
    measurable,
    squared_errors,
    validate,
)
from fastguide.train.value import ValueConfig


def test_halves_are_finished_and_judged(
    engine: Engine, decode: Any, data: Path, tmp_path: Path
) -> None:
    rollouts = [r for r in read(data) if r.sample == 0][:6]
    reward = load_reward("cheerfulness")
    make_validation(
        engine, rollouts, tmp_path, reward, decode, max_tokens=20, completions=3, seed=4
    )
    rows = list(Shards(tmp_path).rows(LABELS))
    assert len(rows) == 6
    for rollout, row in zip(rollouts, rows, strict=True):
        half = len(rollout.response_ids) // 2
        assert row["prefix_ids"] == [*rollout.prompt_ids, *rollout.response_ids[:half]]
        assert len(row["rewards"]) == 3
        assert all(half + tokens <= 20 for tokens in row["tokens"])
    # The rewards are those of whole responses, first halves included.
    finished = [r for r in read(tmp_path) if r.prompt == 0]
    half = rollouts[0].response_ids[: len(rollouts[0].response_ids) // 2]
    whole = [cheerfulness(decode(half + r.response_ids)) for r in finished]
    assert rows[0]["rewards"] == pytest.approx(whole)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    make_validation(
        engine, rollouts, tmp_path, reward, decode, max_tokens=20, completions=3, seed=4
    )
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == before


class Known(torch.nn.Module):
    """A value model that knows some prefixes' values."""

    def __init__(self, values: dict[tuple[int, ...], float], scale: RewardScale) -> None:
        super().__init__()
        self.head = torch.nn.Linear(1, 1)
        self.config = GuideConfig("x", scale)
        self.values = values

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = torch.full(ids.shape, float("nan"))
        for row, tokens in enumerate(ids.tolist()):
            for prefix, value in self.values.items():
                if tuple(tokens[: len(prefix)]) == prefix:
                    out[row, len(prefix) - 1] = value
        return out


def test_errors_are_against_the_mean_of_the_completions(
    engine: Engine, decode: Any, data: Path, tmp_path: Path
) -> None:
    rollouts = [r for r in read(data) if r.sample == 1][:12]
    reward = load_reward("cheerfulness")
    make_validation(engine, rollouts, tmp_path, reward, decode, max_tokens=20, completions=4)
    _, scale = load_episodes(data)
    config = GuideConfig("stories", scale)
    prefixes, rewards = labels(tmp_path, config)
    means = [statistics.fmean(r) for r in rewards]
    keys = [tuple(p) for p in prefixes]
    right: Any = Known(dict(zip(keys, means, strict=True)), scale)
    found = validate(right, tmp_path)
    assert found.mse.mean == pytest.approx(0.0, abs=1e-9)
    assert found.explained_variance.mean == pytest.approx(1.0)
    assert found.correlation.mean == pytest.approx(1.0)
    noise = statistics.fmean(statistics.variance(r) / 4 for r in rewards)
    assert found.noise == pytest.approx(noise)
    shifted: Any = Known({k: m + 0.5 for k, m in zip(keys, means, strict=True)}, scale)
    off = validate(shifted, tmp_path)
    assert off.mse.mean == pytest.approx(0.25)
    assert squared_errors(shifted, tmp_path) == pytest.approx([0.25] * len(keys))
    assert off.mse.low <= off.mse.mean <= off.mse.high
    later = dataclasses.replace(config, gamma=0.5)
    lengths = [row["tokens"] for row in Shards(tmp_path).rows(LABELS)]
    for values, discounted, tokens in zip(
        rewards, labels(tmp_path, later)[1], lengths, strict=True
    ):
        assert discounted == [0.5**n * value for n, value in zip(tokens, values, strict=True)]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reward": RewardScale("brevity")}, "has reward 'cheerfulness', the guide 'brevity'"),
        ({"kind": "classifier"}, "the guide is a classifier; allowed are value models"),
        ({"training": {"policy": "other@123"}}, "has policy 'stories@.*', the guide 'other@123'"),
        ({"training": {"max_tokens": 64}}, "has max_tokens 20, the guide 64"),
        ({"training": {"held_out": 0.01}}, "of 10% of the prompts, of which the guide held out 1%"),
    ],
)
def test_guides_that_a_set_cannot_measure_are_refused(
    engine: Engine, decode: Any, data: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    rollouts = [r for r in read(data) if r.sample == 1][:2]
    reward = load_reward("cheerfulness")
    make_validation(
        engine, rollouts, tmp_path, reward, decode, max_tokens=20, completions=1, held_out=0.1
    )
    guide = dataclasses.replace(GuideConfig("stories", RewardScale("cheerfulness")), **changed)
    with pytest.raises(ValueError, match=said):
        labels(tmp_path, guide)


def test_a_set_that_does_not_fit_is_refused_before_training(
    engine: Engine, decode: Any, data: Path, tmp_path: Path
) -> None:
    rollouts = [r for r in read(data) if r.sample == 1][:2]
    reward = load_reward("cheerfulness")
    validation = tmp_path / "set"
    make_validation(
        engine, rollouts, validation, reward, decode, max_tokens=20, completions=1, held_out=0.5
    )

    def train(kind: str, config: Any, **more: Any) -> None:
        def started(train: int, valid: int) -> None:
            raise AssertionError("training has begun")

        train_guide(
            kind, data, "stories", config, lora_rank=2, validation=validation, on_start=started,
            **more,
        )  # fmt: skip

    config = ValueConfig(**settings(tmp_path / "guide"))
    with pytest.raises(ValueError, match="of 50% of the prompts, of which the guide held out 20%"):
        train("value", config, held_out=0.2)
    with pytest.raises(ValueError, match="the guide is a classifier; allowed are value models"):
        train("fudge", FudgeConfig(**settings(tmp_path / "guide")), held_out=0.5)
    with pytest.raises(AssertionError, match="training has begun"):
        train("value", config, held_out=0.5)


def test_a_prefix_with_a_single_reward_has_the_noise_of_the_others(tmp_path: Path) -> None:
    """Of three completions each, some could not be judged."""
    rewards = [[1.0, 2.0, 3.0], [4.0], [], [0.0, 4.0]]
    rows = [
        {"prefix_ids": [i + 1], "rewards": r, "tokens": [1] * len(r)} for i, r in enumerate(rewards)
    ]
    shards = Shards(tmp_path, {"policy": "p"})
    about = {"reward": "r", "per_token": 0.0, "max_tokens": 9, "held_out": None}
    shards.begin(LABELS, of=1, **about)
    shards.write(LABELS, 0, pa.Table.from_pylist(rows))
    assert measurable(shards) == 3
    known: Any = Known({(1,): 2.0, (2,): 4.0, (4,): 2.0}, RewardScale("r"))
    usual = (1.0 + 8.0) / 2  # variances of the first and the last
    assert validate(known, tmp_path).noise == pytest.approx((1.0 / 3 + usual + 8.0 / 2) / 3)


def test_rewards_per_token_are_validated_by_what_is_to_come(
    engine: Engine, decode: Any, data: Path, tmp_path: Path
) -> None:
    rollouts = [r for r in read(data) if r.sample == 1][:8]
    reward = load_reward("brevity")
    make_validation(engine, rollouts, tmp_path, reward, decode, max_tokens=60, completions=2)
    scale = RewardScale("brevity", -30.0, 5.0, per_token=True)
    config = GuideConfig("stories", scale)
    prefixes, left = labels(tmp_path, config)
    rows = list(Shards(tmp_path).rows(LABELS))
    assert left == [[-tokens / 5.0 for tokens in row["tokens"]] for row in rows]
    _, less = labels(tmp_path, dataclasses.replace(config, gamma=0.5))
    assert less == [[-(1 - 0.5**n) / 5.0 for n in row["tokens"]] for row in rows]
    known = {tuple(p): statistics.fmean(r) + 7 for p, r in zip(prefixes, left, strict=True)}
    model: Any = Known(known, scale)
    assert validate(model, tmp_path).mse.mean == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_of_rewards_per_token_are_what_validation_compares_with(gamma: float) -> None:
    rollouts = [Rollout(n, 0, (1, 2), tuple(range(3, 3 + n)), "stop") for n in (10, 40)]
    episodes, scale = episodes_of(rollouts, [-10.0, -40.0], "brevity", per_token=-1.0)
    batch = collate(episodes)
    zero = torch.zeros(batch.rewards.shape)
    returns = td_lambda(zero, batch.rewards, batch.states, gamma, 1.0)
    for row, n in enumerate((10, 40)):
        for done in (0, n // 2):
            # The state before the tokens that are left: what it pays itself is past.
            state = returns[row, 1 + done].item() - batch.rewards[row, 1 + done].item()
            assert state == pytest.approx(-_discounted(n - done, gamma) / scale.std, rel=1e-5)


def test_a_real_guide_is_measured(engine: Engine, decode: Any, data: Path, tmp_path: Path) -> None:
    rollouts = [r for r in read(data) if r.sample == 2][:10]
    reward = load_reward("cheerfulness")
    make_validation(engine, rollouts, tmp_path, reward, decode, max_tokens=128, completions=4)
    found = validate(ValueModel.from_pretrained("cheerful", dtype=torch.float32), tmp_path)
    assert found.prefixes == 10
    assert found.correlation.mean > 0.2
