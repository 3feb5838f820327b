"""Responses of the policy and their rewards, in a folder that a killed run continues.

Draws depend on seed, prompt and position only, so that a shard made again after a kill is the same
shard: nothing is lost and nothing is there twice. (In bf16 and fp16 that takes the same
``max_rows``, too: other batches round otherwise.) Rewards are series of their own beside the
responses, so that one collection serves many rewards.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastguide.engine import Engine
from fastguide.engine.text import CONTEXT_TOKENS
from fastguide.models.guide_config import RewardScale
from fastguide.request import SamplingParams, sample_seed
from fastguide.rewards import MOST_FAILURES, Reward, Sample, judge_or_raise, spec_of
from fastguide.train.episodes import Episode, Rollout, episodes_of
from fastguide.train.shards import Shards

ROLLOUTS = "rollouts"
"""The series of responses; every other series of a folder is of rewards."""

REASONS = 3
"""Samples of a shard without a reward that the manifest names."""

OnProgress = Callable[[int, int], None]
"""Told how many of how many responses are done."""


@dataclass(frozen=True)
class CollectConfig:
    """How responses are sampled: ``samples_per_prompt`` each, ``shard_prompts`` prompts a shard."""

    samples_per_prompt: int = 2
    max_tokens: int = 128
    temperature: float = 0.7
    seed: int = 0
    shard_prompts: int = 256

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_tokens", "shard_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; allowed are numbers above 0")


def collect(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    folder: str | Path,
    config: CollectConfig,
    *,
    policy: str,
    texts: Sequence[str] | None = None,
    limits: Sequence[int] | None = None,
    on_progress: OnProgress | None = None,
) -> Shards:
    """Sample responses to all prompts, unguided, into ``folder``; shards already there stay.

    Args:
        engine: its base model is the policy.
        prompts: token ids of each prompt; those that are empty or leave no room for a token in
            the context are left out, and the manifest says how many.
        folder: made if needed.
        config: sampling and shard size.
        policy: a name for the model, kept in the manifest: a folder is not continued with another.
        texts: of the prompts, as rewards read them; None reads the decoded ids.
        limits: most tokens of the responses to each prompt, where they differ from ``config``'s.
        on_progress: told after each response, those already there included.

    Raises:
        ValueError: when the folder holds rollouts of other prompts, settings or policy, or more
            than 5 % of the prompts would be left out.
    """
    check_prompts(prompts, engine.limits.context)
    shards = open_shards(prompts, folder, config, policy, texts)
    shards.note(**about_model(engine.name_or_path, engine.tokenizer))
    most = [config.max_tokens] * len(prompts) if limits is None else list(limits)
    done, of = 0, len(prompts) * config.samples_per_prompt
    for number in range(shards.series[ROLLOUTS]["of"]):
        first = number * config.shard_prompts
        chunk = shard_prompts(prompts, config, number)
        if not shards.has(ROLLOUTS, number):
            said = None if texts is None else texts[first : first + len(chunk)]
            rollouts = []
            for rollout in sample(engine, chunk, first, config, most[first:], said):
                rollouts.append(rollout)
                if on_progress is not None:
                    on_progress(done + len(rollouts), of)
            table, failed = table_of(rollouts), len(chunk) * config.samples_per_prompt
            shards.write(ROLLOUTS, number, table, failed=failed - table.num_rows)
        done += len(chunk) * config.samples_per_prompt
        if on_progress is not None:
            on_progress(done, of)
    return shards


def about_model(model: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Where a policy is, and what tells its tokenizer from others."""
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {"model": model, "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()}


def check_tokenizer(shards: Shards, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse, by a ValueError, a model that reads the token ids of a collection otherwise."""
    known = shards.notes.get("tokenizer")
    if known is not None and about_model(model, tokenizer)["tokenizer"] != known:
        raise ValueError(
            f"{shards.folder} is of {shards.notes['model']!r}, and {model!r} has another "
            "tokenizer; allowed is the same"
        )


def can_continue(prompt: Sequence[int], context: int | None) -> bool:
    """Whether it has a token, and leaves room for one in the context, if that has an end."""
    return len(prompt) >= 1 and (context is None or len(prompt) < context)


def check_prompts(prompts: Sequence[Sequence[int]], context: int | None) -> None:
    """Refuse prompts of which more than 5 % cannot be continued; ValueError names the first."""
    refused = [i for i, prompt in enumerate(prompts) if not can_continue(prompt, context)]
    if len(refused) > MOST_FAILURES * len(prompts):
        raise ValueError(
            f"{len(refused)} of {len(prompts)} prompts cannot be continued (allowed are 5 %), "
            f"first prompt {refused[0]}: it has {len(prompts[refused[0]])} tokens; allowed are "
            f"{'more than 0' if context is None else f'1 to {context - 1}'}"
        )


def open_shards(
    prompts: Sequence[Sequence[int]],
    folder: str | Path,
    config: CollectConfig,
    policy: str,
    texts: Sequence[str] | None = None,
) -> Shards:
    """The folder of a collection, begun or continued; see ``collect``."""
    asked = [list(p) for p in prompts] + list(texts or [])
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    about = {"policy": policy, "prompts": digest, "sampling": asdict(config)}
    shards = Shards(folder, about)
    shards.begin(ROLLOUTS, of=-(-len(prompts) // config.shard_prompts))
    return shards


def shard_prompts(
    prompts: Sequence[Sequence[int]], config: CollectConfig, number: int
) -> list[list[int]]:
    """The prompts of one shard."""
    start = number * config.shard_prompts
    return [list(prompt) for prompt in prompts[start : start + config.shard_prompts]]


def sample(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    first: int,
    config: CollectConfig,
    limits: Sequence[int],
    texts: Sequence[str] | None = None,
) -> Iterator[Rollout]:
    """Responses to prompts ``first``, ``first + 1``, …, as they end.

    ``limits`` are theirs, and ``texts``, where rewards do not read the decoded ids.

    Prompts that cannot be continued get none.
    """
    context = engine.limits.context
    usable = [i for i, prompt in enumerate(prompts) if can_continue(prompt, context)]
    sampling = [
        SamplingParams(
            temperature=config.temperature,
            max_tokens=limits[i],
            n=config.samples_per_prompt,
            seed=sample_seed(config.seed, first + i + 1),
        )
        for i in usable
    ]
    for output in engine.completions([list(prompts[i]) for i in usable], sampling=sampling):
        index = usable[output.prompt]
        if output.error is not None:
            raise ValueError(f"prompt {first + index}: {output.error}")
        yield Rollout(
            prompt=first + index,
            sample=output.sample,
            prompt_ids=tuple(prompts[index]),
            response_ids=tuple(output.token_ids),
            finish_reason=str(output.finish_reason),
            prompt_text=None if texts is None else texts[index],
        )


def table_of(rollouts: Sequence[Rollout]) -> Any:
    """A shard of responses, in the order of prompts and samples."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    schema = pa.schema(
        {
            "prompt": pa.int64(),
            "sample": pa.int32(),
            "prompt_ids": ids,
            "response_ids": ids,
            "finish_reason": pa.string(),
            "prompt_text": pa.string(),
        }
    )
    ordered = sorted(rollouts, key=lambda r: (r.prompt, r.sample))
    return pa.Table.from_pylist([asdict(rollout) for rollout in ordered], schema=schema)


def read(folder: str | Path) -> Iterator[Rollout]:
    """All rollouts of a finished folder, in the order of the prompts.

    Raises:
        ValueError: when the folder has no manifest, is unfinished, or a shard is not what the
            manifest says.
    """
    for row in Shards(folder).rows(ROLLOUTS):
        yield _rollout(row)


def rollouts_of(table: Any) -> list[Rollout]:
    """The responses of one shard."""
    return [_rollout(row) for row in table.to_pylist()]


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
            more than 5 % of the samples of a shard cannot be judged, which are then named.
    """
    shards = label_series(folder, reward, name, max_tokens)
    rows = [entry["rows"] for entry in shards.series[ROLLOUTS]["shards"].values()]
    done = 0
    for number in range(shards.series[name]["of"]):
        rollouts = rollouts_of(shards.read(ROLLOUTS, number))
        if not shards.has(name, number):
            table, failed = judged(rollouts, reward, decode, max_tokens)
            shards.write(name, number, table, failed=len(failed), reasons=failed[:REASONS])
        done += len(rollouts)
        if on_progress is not None:
            on_progress(done, sum(rows))
    return shards


def label_series(folder: str | Path, reward: Reward, name: str, max_tokens: int | None) -> Shards:
    """The folder with a series of rewards begun or continued; see ``label``."""
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


def judged(
    rollouts: Sequence[Rollout],
    reward: Reward,
    decode: Callable[[Sequence[int]], str],
    max_tokens: int | None,
) -> tuple[Any, list[str]]:
    """A shard of rewards, row by row beside the responses, and which could not be judged, and why.

    Raises:
        ValueError: more than 5 % of them could not.
    """
    import pyarrow as pa

    samples = []
    for rollout in rollouts:
        ids = rollout.response_ids[:max_tokens]
        samples.append(sample_of(rollout, ids, decode))

    def where(i: int) -> str:
        return f"prompt {rollouts[i].prompt}, sample {rollouts[i].sample}"

    values, failures = judge_or_raise(reward, samples, where)
    reasons = {failure.sample: failure.reason for failure in failures}
    table = pa.table(
        {
            "reward": pa.array(values, pa.float64()),
            "response": pa.array([s.response for s in samples], pa.string()),
            "failure": pa.array([reasons.get(i) for i in range(len(samples))], pa.string()),
        }
    )
    return table, [f"{where(f.sample)}: {f.reason}" for f in failures]


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


def failures(shards: Shards, name: str) -> int:
    """How many responses a series leaves out."""
    return sum(entry.get("failed", 0) for entry in shards.series[name]["shards"].values())


def reasons(shards: Shards, name: str) -> list[str]:
    """Some of the responses that a series of rewards leaves out, and why."""
    entries = shards.series[name]["shards"].values()
    return [reason for entry in entries for reason in entry.get("reasons", [])]


def _rollout(row: dict[str, Any]) -> Rollout:
    ids = {key: tuple(row[key]) for key in ("prompt_ids", "response_ids")}
    return Rollout(**(row | ids))
