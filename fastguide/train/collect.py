"""Responses of the policy and their rewards, in a folder that a killed run continues.

Draws depend on seed, prompt and position only, so that a shard made again after a kill is the same
shard: nothing is lost and nothing is there twice. (In bf16 and fp16 other batches round otherwise,
so that it takes the same ``max_rows``, and a shard that was killed in between may differ.) Rewards
are series of their own beside the responses, so that one collection serves many rewards.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastguide.engine import Engine
from fastguide.files import Draft
from fastguide.request import SamplingParams, sample_seed
from fastguide.rewards import MOST_FAILURES
from fastguide.train.episodes import Rollout
from fastguide.train.shards import Shards

ROLLOUTS = "rollouts"
"""The series of responses; every other series of a folder is of rewards."""

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
    """Sample responses to all prompts, unguided, into ``folder``; what is already there stays.

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
        chunk, draft = shard_prompts(prompts, config, number), shards.draft(ROLLOUTS, number)
        if not shards.has(ROLLOUTS, number):
            said = None if texts is None else texts[first : first + len(chunk)]
            groups = drafted(draft)
            whole, count = frozenset(groups), sum(map(len, groups.values()))
            for rollout in sample(engine, chunk, first, config, most[first:], said, whole):
                group = groups.setdefault(rollout.prompt, [])
                group.append(rollout)
                count += 1
                if len(group) == config.samples_per_prompt:
                    draft.add([asdict(each) for each in group])
                if on_progress is not None:
                    on_progress(done + count, of)
            table = table_of([rollout for group in groups.values() for rollout in group])
            failed = len(chunk) * config.samples_per_prompt - table.num_rows
            shards.write(ROLLOUTS, number, table, failed=failed)
        draft.drop()
        done += len(chunk) * config.samples_per_prompt
        if on_progress is not None:
            on_progress(done, of)
    return shards


def drafted(draft: Draft) -> dict[int, list[Rollout]]:
    """The responses to those prompts of a shard that have all of theirs."""
    groups = ([_rollout(row) for row in part] for part in draft.parts())
    return {group[0].prompt: group for group in groups}


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
    done: Container[int] = (),
) -> Iterator[Rollout]:
    """Responses to prompts ``first``, ``first + 1``, …, as they end.

    ``limits`` are theirs, and ``texts``, where rewards do not read the decoded ids. Prompts that
    are ``done`` have their responses.

    Prompts that cannot be continued get none.
    """
    context = engine.limits.context
    usable = [
        i
        for i, prompt in enumerate(prompts)
        if can_continue(prompt, context) and first + i not in done
    ]
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
        if output.finish_reason == "aborted":  # an interrupt, which follows
            continue
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


def kept(shards: Shards) -> int:
    """How many responses there are so far."""
    found = shards.series[ROLLOUTS]
    missing = [n for n in range(found["of"]) if not shards.has(ROLLOUTS, n)]
    drafts = [shards.draft(ROLLOUTS, number) for number in missing]
    begun = sum(len(group) for draft in drafts for group in drafted(draft).values())
    return begun + sum(entry["rows"] for entry in found["shards"].values())


def responses_of(shards: Shards) -> int:
    """How many responses a collection has."""
    return sum(entry["rows"] for entry in shards.series[ROLLOUTS]["shards"].values())


def failures(shards: Shards, name: str) -> int:
    """How many responses a series leaves out."""
    return sum(entry.get("failed", 0) for entry in shards.series[name]["shards"].values())


def _rollout(row: dict[str, Any]) -> Rollout:
    ids = {key: tuple(row[key]) for key in ("prompt_ids", "response_ids")}
    return Rollout(**(row | ids))
