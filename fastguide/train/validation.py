"""Validation of a guide by Monte Carlo: what prefixes are worth, from many ways to finish them.

A return says what one response came to; the value of a prefix is the mean over all. So held-out
responses are cut in half, each half is finished m times by the policy (10 in the paper, appendix
C.1), and the mean reward is the label that a guide is measured against.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastguide.engine import Engine
from fastguide.models.guide_config import GuideConfig
from fastguide.models.value import ValueModel
from fastguide.rewards import Reward, judge_or_raise, spec_of
from fastguide.train.collect import CollectConfig, OnProgress, collect, read
from fastguide.train.episodes import Rollout
from fastguide.train.labels import sample_of
from fastguide.train.shards import Shards

LABELS = "values"
"""The series of rewards of a validation set."""

BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, from prefixes drawn again and again."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Validation:
    """How well a guide knows what prefixes are worth, in standard deviations of the reward.

    Attributes:
        mse: mean squared error against the labels.
        explained_variance: 1 - mse / variance of the labels.
        noise: what of the error is the labels' own: the variance of a prefix's rewards / m. A
            prefix with one reward counts with the variance of the others; NaN if all have one.
        correlation: of values and labels.
        prefixes: how many.
    """

    mse: Interval
    explained_variance: Interval
    noise: float
    correlation: Interval
    prefixes: int


def make_validation(
    engine: Engine,
    rollouts: Sequence[Rollout],
    folder: str | Path,
    reward: Reward,
    decode: Callable[[Sequence[int]], str],
    *,
    max_tokens: int,
    completions: int = 10,
    temperature: float = 0.7,
    held_out: float | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Shards:
    """Cut responses in half, finish each half ``completions`` times, and judge what comes out.

    A killed run continues; the completions of a half share its cache.

    Args:
        engine: its base model is the policy.
        rollouts: held-out responses; those that cannot be cut (``has_halves``) are left out.
        folder: made if needed.
        reward: judges whole responses, the half that was there included.
        decode: token ids to text without special tokens.
        max_tokens: of whole responses, as in the collection.
        completions: m.
        temperature: of the completions.
        held_out: the share of prompts that these are from; a guide that held out less has seen
            some of them, and is refused.
        seed: of the completions.
        on_progress: told after each completion.

    Raises:
        ValueError: no response is long enough, or the folder is of other halves.
    """
    chosen = [r for r in rollouts if has_halves(r)]
    if not chosen:
        raise ValueError("no response has two tokens, so none can be cut in half")
    halves = [len(r.response_ids[:max_tokens]) // 2 for r in chosen]
    prefixes = [
        [*r.prompt_ids, *r.response_ids[:half]] for r, half in zip(chosen, halves, strict=True)
    ]
    config = CollectConfig(completions, max_tokens, temperature, seed, shard_prompts=32)
    limits = [max_tokens - half for half in halves]
    policy = engine.policy
    shards = collect(
        engine, prefixes, folder, config, policy=policy, limits=limits, on_progress=on_progress
    )
    shards.begin(
        LABELS,
        of=1,
        reward=reward.name,
        spec=spec_of(reward),
        per_token=reward.per_token,
        max_tokens=max_tokens,
        held_out=held_out,
    )
    if not shards.has(LABELS, 0):
        shards.write(LABELS, 0, _judged(shards, chosen, halves, reward, decode))
    return shards


def has_halves(rollout: Rollout) -> bool:
    """Whether a response can be cut in half."""
    return len(rollout.response_ids) > 1


def measurable(shards: Shards) -> int:
    """How many prefixes of a validation set have a reward."""
    return sum(bool(row["rewards"]) for row in shards.rows(LABELS))


def _judged(
    shards: Shards,
    chosen: Sequence[Rollout],
    halves: Sequence[int],
    reward: Reward,
    decode: Callable[[Sequence[int]], str],
) -> Any:
    """One row per prefix: its tokens, and the rewards and lengths of its completions."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = [
        {"prefix_ids": [], "rewards": [], "tokens": []} for _ in range(len(chosen))
    ]
    samples, where = [], []
    for rollout in read(shards.folder):
        row, source = rows[rollout.prompt], chosen[rollout.prompt]
        row["prefix_ids"] = list(rollout.prompt_ids)
        whole = source.response_ids[: halves[rollout.prompt]] + rollout.response_ids
        samples.append(sample_of(source, whole, decode))
        where.append((row, len(rollout.response_ids)))
    values, _ = judge_or_raise(reward, samples, lambda i: f"completion {i}")
    for (row, tokens), value in zip(where, values, strict=True):
        if value is not None:
            row["rewards"].append(value)
            row["tokens"].append(tokens)
    schema = pa.schema(
        {
            "prefix_ids": pa.list_(pa.int32()),
            "rewards": pa.list_(pa.float64()),
            "tokens": pa.list_(pa.int32()),
        }
    )
    return pa.Table.from_pylist(rows, schema=schema)


def labels(folder: str | Path, config: GuideConfig) -> tuple[list[list[int]], list[list[float]]]:
    """Prefixes, and for each its completions' discounted returns in the unit of a guide.

    Of a reward per token, what counts is what is still to come. Its unit has a shift that all
    prefixes share, which is left out: ``validate`` compares without it.

    Raises:
        ValueError: the folder is no validation set or unfinished; the guide is no value model, or
            is of another reward, policy or length of responses, or has trained on its prompts; or
            fewer than two prefixes have rewards.
    """
    shards = Shards(folder)
    rows = list(shards.rows(LABELS))
    scale, gamma = config.reward, config.gamma
    about = shards.series[LABELS]["about"] | {"policy": shards.about["policy"]}
    if config.kind != "value":
        raise ValueError(f"the guide is a {config.kind}; allowed are value models")
    ours = {"reward": scale.name} | {
        name: config.training[name] for name in ("policy", "max_tokens") if name in config.training
    }
    for name, fact in ours.items():
        if about[name] != fact:
            raise ValueError(
                f"the validation set {folder} has {name} {about[name]!r}, the guide {fact!r}"
            )
    share, kept = about["held_out"], config.training.get("held_out")
    if share is not None and kept is not None and kept < share:
        raise ValueError(
            f"the validation set {folder} is of {share:.0%} of the prompts, of which the guide "
            f"held out {kept:.0%}; allowed is no more than that"
        )
    prefixes, values = [], []
    for row in rows:
        if row["rewards"]:
            prefixes.append(row["prefix_ids"])
            if scale.per_token:
                paid = [about["per_token"] * _discounted(n, gamma) for n in row["tokens"]]
                values.append([reward / scale.std for reward in paid])
            else:
                ends = scale.standardise(row["rewards"])
                values.append([gamma**n * end for n, end in zip(row["tokens"], ends, strict=True)])
    if len(prefixes) < 2:
        raise ValueError(f"the validation set {folder} has {len(prefixes)} prefixes; 2 are needed")
    return prefixes, values


def _discounted(tokens: int, gamma: float) -> float:
    """What so many payments of 1 are worth, the first of them one step ahead."""
    return sum(gamma**i for i in range(1, tokens + 1)) if gamma != 1.0 else float(tokens)


def validate(model: ValueModel, folder: str | Path, *, batch_size: int = 32) -> Validation:
    """Measure a value model against a validation set.

    Raises:
        ValueError: as ``labels``.
    """
    pairs, rewards = _compared(model, folder, batch_size)
    spreads = [statistics.variance(row) for row in rewards if len(row) > 1]
    usual = statistics.fmean(spreads) if spreads else math.nan
    noise = statistics.fmean(
        statistics.variance(row) / len(row) if len(row) > 1 else usual for row in rewards
    )
    return Validation(
        mse=_interval(pairs, _mse),
        explained_variance=_interval(pairs, _explained),
        noise=noise,
        correlation=_interval(pairs, _correlation),
        prefixes=len(pairs),
    )


def squared_errors(model: ValueModel, folder: str | Path, *, batch_size: int = 32) -> list[float]:
    """What ``validate`` takes the mean of, to compare guides prefix by prefix.

    Returns:
        One for each prefix, in variances of the reward; the same order for every guide.

    Raises:
        ValueError: as ``labels``.
    """
    return [(value - label) ** 2 for value, label in _compared(model, folder, batch_size)[0]]


@torch.inference_mode()
def _compared(
    model: ValueModel, folder: str | Path, batch_size: int
) -> tuple[list[tuple[float, float]], list[list[float]]]:
    """Value and label of each prefix, and the returns that the label is the mean of."""
    scale = model.config.reward
    prefixes, rewards = labels(folder, model.config)
    device = next(model.head.parameters()).device
    values = []
    for start in range(0, len(prefixes), batch_size):
        chunk = prefixes[start : start + batch_size]
        ids = torch.zeros(len(chunk), max(map(len, chunk)), dtype=torch.int64)
        for row, prefix in zip(ids, chunk, strict=True):
            row[: len(prefix)] = torch.tensor(prefix)
        last = torch.tensor([len(prefix) - 1 for prefix in chunk])
        found = model(ids.to(device)).float().cpu()
        values += found.gather(1, last[:, None])[:, 0].tolist()
    means = [statistics.fmean(row) for row in rewards]
    if scale.per_token:  # a value's shift is that of all prefixes
        shift = statistics.fmean(means) - statistics.fmean(values)
        values = [value + shift for value in values]
    return list(zip(values, means, strict=True)), rewards


Pairs = Sequence[tuple[float, float]]


def _interval(pairs: Pairs, measure: Callable[[Pairs], float]) -> Interval:
    rng = random.Random(0)
    drawn = sorted(measure(rng.choices(pairs, k=len(pairs))) for _ in range(BOOTSTRAPS))
    cut = BOOTSTRAPS // 40
    return Interval(measure(pairs), drawn[cut], drawn[-cut - 1])


def _mse(pairs: Pairs) -> float:
    return statistics.fmean((v - label) ** 2 for v, label in pairs)


def _explained(pairs: Pairs) -> float:
    variance = statistics.pvariance([label for _, label in pairs])
    return 1 - _mse(pairs) / variance if variance > 0 else 0.0


def _correlation(pairs: Pairs) -> float:
    values, means = zip(*pairs, strict=True)
    if len(set(values)) < 2 or len(set(means)) < 2:
        return 0.0
    return statistics.correlation(values, means)
