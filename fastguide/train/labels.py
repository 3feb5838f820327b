"""Rewards of a collection: series beside the responses, so that one serves many rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastguide.engine.text import CONTEXT_TOKENS
from fastguide.models.guide_config import RewardScale
from fastguide.rewards import Reward, Sample, check_failures, judge, spec_of
from fastguide.train.collect import ROLLOUTS, OnProgress, read, responses_of, rollouts_of
from fastguide.train.episodes import Episode, Rollout, episodes_of
from fastguide.train.shards import Shards

REASONS = 3
"""Samples of a shard without a reward that the manifest names."""


def label(
    folder: str | Path,
    reward: Reward,
    decode: Callable[[Sequence[int]], str],
    *,
    name: str = "reward",
    max_tokens: int | None = None,
    on_progress: OnProgress | None = None,
) -> Shards:
    """Judge the responses of a finished collection; shards already judged stay.

    Args:
        folder: where ``collect`` put the responses.
        reward: judges them.
        decode: token ids to text without special tokens.
        name: of the series of rewards; a folder may hold several.
        max_tokens: judge the first so many tokens: they are a response sampled with that limit.
        on_progress: told after each shard how many responses are judged.

    Raises:
        ValueError: the responses are unfinished; the series is of another reward or limit; or
            more than 5 % of all samples cannot be judged. What was judged is kept.
    """
    shards = label_series(folder, reward, name, max_tokens)
    of, done = responses_of(shards), 0
    for number in range(shards.series[name]["of"]):
        rollouts = rollouts_of(shards.read(ROLLOUTS, number))
        if not shards.has(name, number):
            table, failed = judged(rollouts, reward, decode, max_tokens)
            keep(shards, name, number, table, len(failed), failed[:REASONS])
        done += len(rollouts)
        if on_progress is not None:
            on_progress(done, of)
    return shards


def keep(
    shards: Shards, name: str, number: int, table: Any, failed: int, reasons: list[str]
) -> None:
    """Write a shard of rewards, unless with it more than 5 % of all samples had none.

    Args:
        shards: the folder, in which the series is begun.
        name: of the series.
        number: of the shard.
        table: its rewards, row by row beside the responses; see ``judged``.
        failed: how many of them have none.
        reasons: of some of these.

    Raises:
        ValueError: more than 5 % had none; the shard is not written.
    """
    entries = [*shards.series[name]["shards"].values(), {"failed": failed, "reasons": reasons}]
    if first := [reason for entry in entries for reason in entry["reasons"]]:
        count = sum(entry["failed"] for entry in entries)
        check_failures(
            shards.series[name]["about"]["reward"], count, responses_of(shards), first[0]
        )
    shards.write(name, number, table, failed=failed, reasons=reasons)


def label_series(folder: str | Path, reward: Reward, name: str, max_tokens: int | None) -> Shards:
    """The folder with a series of rewards begun or continued; see ``label``."""
    check_labels(name)
    shards = Shards(folder)
    if not shards.complete(ROLLOUTS):
        raise ValueError(f"the rollouts at {folder} are unfinished; run their collection again")
    of = shards.series[ROLLOUTS]["of"]
    shards.begin(
        name,
        of,
        reward=reward.name,
        spec=spec_of(reward),
        max_tokens=max_tokens,
        per_token=reward.per_token,
    )
    return shards


def check_labels(name: str) -> None:
    """Refuse, by a ValueError, a name of rewards that is that of the responses."""
    if name == ROLLOUTS:
        raise ValueError(f"the rewards are called {name!r}, as responses are; choose another name")


def judged(
    rollouts: Sequence[Rollout],
    reward: Reward,
    decode: Callable[[Sequence[int]], str],
    max_tokens: int | None,
) -> tuple[Any, list[str]]:
    """A shard of rewards, row by row beside the responses, and what has none, and why."""
    import pyarrow as pa

    samples = []
    for rollout in rollouts:
        ids = rollout.response_ids[:max_tokens]
        samples.append(sample_of(rollout, ids, decode))

    values, failures = judge(reward, samples)
    reasons = {failure.sample: failure.reason for failure in failures}
    table = pa.table(
        {
            "reward": pa.array(values, pa.float64()),
            "response": pa.array([s.response for s in samples], pa.string()),
            "failure": pa.array([reasons.get(i) for i in range(len(samples))], pa.string()),
        }
    )
    failed = [(rollouts[failure.sample], failure.reason) for failure in failures]
    return table, [f"prompt {r.prompt}, sample {r.sample}: {reason}" for r, reason in failed]


def sample_of(
    rollout: Rollout, response_ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Sample:
    """Prompt and response as texts, for a reward; ``response_ids`` are judged, not the rollout's.

    The response is read after the prompt's last tokens: alone, some tokenizers would drop the
    space that it begins with.
    """
    last = list(rollout.prompt_ids[-CONTEXT_TOKENS:])
    text = decode([*last, *response_ids])[len(decode(last)) :]
    prompt = rollout.prompt_text
    if prompt is None:
        prompt = decode(rollout.prompt_ids)
    return Sample(prompt, text, len(response_ids))


def load_episodes(folder: str | Path, labels: str = "reward") -> tuple[list[Episode], RewardScale]:
    """The episodes of a collection and one of its series of rewards; see ``episodes_of``.

    Raises:
        ValueError: either is missing, unfinished or broken, or the rewards do not vary.
    """
    check_labels(labels)
    shards = Shards(folder)
    rows = list(shards.rows(labels))
    about = shards.series[labels]["about"]
    return episodes_of(
        read(folder),
        (row["reward"] for row in rows),
        about["reward"],
        max_tokens=about["max_tokens"],
        per_token=about["per_token"],
    )


def reasons(shards: Shards, name: str) -> list[str]:
    """Some of the responses that a series of rewards leaves out, and why."""
    entries = shards.series[name]["shards"].values()
    return [reason for entry in entries for reason in entry.get("reasons", [])]
