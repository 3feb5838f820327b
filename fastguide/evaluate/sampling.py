"""The responses of a point; whoever is killed continues with what the draft has."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Container, Iterator, Sequence

from fastguide.engine import Engine
from fastguide.engine.requests import build_request
from fastguide.engine.text import Prompt, encode
from fastguide.evaluate.estimates import Row
from fastguide.evaluate.metrics import diversity
from fastguide.evaluate.study import Point
from fastguide.files import Draft
from fastguide.request import Completion, SamplingParams, sample_seed

WARM_UP = 2
"""Tokens that are sampled before the clock starts."""


def check(engine: Engine, points: Sequence[Point], prompts: Sequence[Prompt]) -> None:
    """Refuse what the engine would refuse later.

    Raises:
        ValueError: naming point and prompt, and what is wrong.
    """
    tokens: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        try:
            tokens.append(encode(engine.tokenizer, prompt))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from error
    for point in points:
        weights = dict(point.weights) or None
        for i, ids in enumerate(tokens):
            try:
                build_request(i, ids, point.rule, weights, point.sampling, engine.limits)
            except ValueError as error:
                raise ValueError(f"{point.name}, prompt {i}: {error}") from error


def sample(
    engine: Engine,
    point: Point,
    prompts: Sequence[Prompt],
    draft: Draft,
    on_progress: Callable[[int], None],
) -> list[Row]:
    """All responses of a point, by prompt and sample.

    Each has a seed of its own, so in fp32 it is the same whether or not others are there already.

    Args:
        engine: of the point's policy, with its guides.
        point: what to sample.
        prompts: of the study.
        draft: keeps every response as soon as it ends; what it has is not sampled again.
        on_progress: told how many there are.

    Raises:
        ValueError: a response failed.
    """
    rows: dict[tuple[int, int], Row] = {(r["prompt"], r["sample"]): r for r in draft.parts()}
    weights = dict(point.weights) or None
    asked = list(_missing(point.sampling, len(prompts), rows))
    if asked:
        warm_up = dataclasses.replace(point.sampling, n=1, max_tokens=WARM_UP)
        list(engine.completions(prompts[:1], point.rule, weights, warm_up))
        engine.clear_prefixes()  # else a point would be faster than those before it
    before = time.perf_counter()
    outputs = engine.completions(
        [prompts[i] for i, _, _ in asked],
        point.rule,
        weights,
        [sampling for _, _, sampling in asked],
    )
    for output in outputs:
        prompt, first, _ = asked[output.prompt]
        if output.error is not None:
            raise ValueError(f"{point.name}, prompt {prompt}: {output.error}")
        if output.finish_reason == "aborted":  # an interrupt, which follows
            continue
        now = time.perf_counter()
        row = _row(output, prompt, first + output.sample, now - before)
        before = now
        draft.add(row)
        rows[prompt, row["sample"]] = row
        on_progress(len(rows))
    seconds = statistics.fmean(row["seconds"] for row in rows.values())  # they share their passes
    return [row | {"seconds": seconds} for _, row in sorted(rows.items())]


def _missing(
    sampling: SamplingParams, prompts: int, done: Container[tuple[int, int]]
) -> Iterator[tuple[int, int, SamplingParams]]:
    """Prompts, the first of their samples that is asked for, and how those are sampled."""
    for prompt in range(prompts):
        seed = sample_seed(sampling.seed or 0, prompt + 1)
        missing = [i for i in range(sampling.n) if (prompt, i) not in done]
        if len(missing) == sampling.n:
            yield prompt, 0, dataclasses.replace(sampling, seed=seed)
            continue
        for i in missing:
            yield prompt, i, dataclasses.replace(sampling, n=1, seed=sample_seed(seed, i))


def _row(output: Completion, prompt: int, sample: int, seconds: float) -> Row:
    return {
        "prompt": prompt,
        "sample": sample,
        "text": output.text,
        "token_ids": output.token_ids,
        "tokens": len(output.token_ids),
        "scored": sum(output.scored),
        "prompt_tokens": output.prompt_tokens,
        "finish_reason": output.finish_reason,
        "kl": sum(output.kl),
        "logprob": sum(output.logprobs),
        "log_ratio": sum(output.logprobs) - sum(output.base_logprobs),
        "seconds": seconds,
        "diversity": diversity(output.text),
    }
