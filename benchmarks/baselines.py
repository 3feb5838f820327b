"""fastguide's steps beside the baselines', for one request: who decodes what, in which order.

The rows that live in this process take turns every few steps; those that only decode whole
responses (``transformers.generate``, the published code in its own process) every round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import record
import torch
from honest import HonestDecoding, Method
from others import Setting, Timing, gpt_fast_decoder, transformers_decoder, vllm_decoder
from published import Published, Source
from shapes import (
    GUIDE_SEED,
    POLICY_SEED,
    SHAPE,
    Shape,
    build,
    open_rows,
    prompt_tokens,
    random_head,
    random_llama,
)

from fastguide import ARGS, VAS, Plain
from fastguide.config import Rule
from fastguide.engine.runner import ModelRunner

# With β = 100 the candidates have nearly all of the mass although random weights give a flat
# distribution. A draw past them costs the honest baseline a second pass of the guide.
CASES = {
    "VAS k=20": Method("vas", 20, 100.0, 0.7),
    "ARGS k=10": Method("args", 10, 1.5, 0.0),
    "ARGS k=10 sampled": Method("args", 10, 1.5, 0.7),
}
WARM_UP = 4
"""Steps that open each round and are not counted."""
CHUNK = 8
"""Steps of a turn: others' decoding is not broken off at every step either."""


class Plan(NamedTuple):
    """What is measured, and with which code of others."""

    device: str
    prompt: int = 256
    steps: int = 64
    rounds: int = 3
    source: Source | None = None
    gpt_fast: str | None = None
    shape: Shape = SHAPE


class Models(NamedTuple):
    """The honest baseline's models; fastguide has its own copies of the same weights."""

    policy: Any
    guide: Any
    head: torch.nn.Linear

    @classmethod
    def load(cls, device: str, dtype: torch.dtype, shape: Shape) -> Models:
        """The weights of ``shapes.build``."""
        policy = random_llama(device, "sdpa", dtype, shape, POLICY_SEED)
        guide = random_llama(device, "sdpa", dtype, shape, GUIDE_SEED)
        return cls(policy, guide.model, random_head(device, dtype, shape))

    def decoding(self, prompts: Sequence[Sequence[int]], method: Method) -> HonestDecoding:
        """Requests, their prompts read."""
        return HonestDecoding(self.policy, self.guide, self.head, prompts, method)


def rule_of(method: Method) -> Rule:
    """fastguide's rule for it."""
    if method.name == "vas":
        return VAS(beta=method.strength, k=method.k)
    return ARGS(weight=method.strength, k=method.k)


def check(
    device: str,
    source: Source | None = None,
    shape: Shape = SHAPE,
    prompt: int = 32,
    steps: int = 8,
) -> dict[str, list[list[int]]]:
    """Greedy tokens in fp32 must be the same from everyone; they are returned.

    Raises:
        SystemExit: if they are not.
    """
    prompts = [prompt_tokens(row, prompt, shape) for row in range(2)]
    runner = build(device, torch.float32, shape)
    models = Models.load(device, torch.float32, shape)
    agreed = {}
    with published_code(source, device, torch.float32, shape) as published:
        for name in ("VAS k=20", "ARGS k=10"):
            method = CASES[name]._replace(temperature=0.0)
            rows = open_rows(runner, rule_of(method), prompts, 0.0)
            expected = transposed([runner.step(rows)[0].tokens for _ in range(steps)])
            for row in rows:
                row.close()
            honest = models.decoding(prompts, method)
            found = {"honest": transposed([honest.step() for _ in range(steps)])}
            if published and published.offers(method):
                found["published"] = [published.decode(method, p, steps)[0] for p in prompts]
            for who, tokens in found.items():
                if tokens != expected:
                    raise SystemExit(f"{name}: {who} gives {tokens}, fastguide {expected}")
            agreed[name] = expected
    return agreed


def transposed(steps: Sequence[Sequence[int]]) -> list[list[int]]:
    """Tokens by request, from tokens by step."""
    return [list(row) for row in zip(*steps, strict=True)]


@contextmanager
def published_code(
    source: Source | None, device: str, dtype: torch.dtype, shape: Shape
) -> Iterator[Published | None]:
    """The published code, or None where there is none."""
    if source is None:
        yield None
        return
    with Published(source, device, dtype, shape) as published:
        yield published


def measure(plan: Plan, runner: ModelRunner) -> dict[str, Any]:
    """Every row's milliseconds and tokens per second, and how it compares with fastguide."""
    prompt = prompt_tokens(0, plan.prompt, plan.shape)
    times: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    models = Models.load(plan.device, torch.bfloat16, plan.shape)
    setting = Setting(plan.device, plan.prompt, plan.steps, plan.shape)
    others = {
        "transformers unguided": transformers_decoder(setting),
        "gpt-fast unguided": gpt_fast_decoder(setting, plan.gpt_fast),
        "vLLM unguided": vllm_decoder(setting),
    }
    outside = {f"honest {name}": 0 for name, case in CASES.items() if case.name == "vas"}
    with published_code(plan.source, plan.device, torch.bfloat16, plan.shape) as published:
        for name, case in CASES.items():
            if published and published.offers(case):
                others[f"published {name}"] = _published_decoder(published, case, prompt, plan)
        for _ in range(plan.rounds):
            for name, seconds in _round(plan, runner, models, prompt, outside).items():
                times.setdefault(name, []).extend(seconds)
            for name, decode in others.items():
                timing = decode()
                if timing.seconds is None:
                    missing[name] = timing.reason
                else:
                    times.setdefault(name, []).extend(timing.seconds)
    return {
        "batch": 1,
        "prompt": plan.prompt,
        "new_tokens": plan.steps,
        "rounds": plan.rounds,
        "methods": {name: case._asdict() for name, case in CASES.items()},
        "published": published.versions if published else {},
        "rows": _compared(times, outside),
        "missing": missing,
    }


def _compared(times: dict[str, list[float]], outside: dict[str, int]) -> dict[str, Any]:
    """Medians, and how many times fastguide's they are."""
    rows: dict[str, Any] = {}
    for name, seconds in sorted(times.items(), key=lambda item: _order(item[0])):
        rate = round(1 / statistics.median(seconds), 1)
        rows[name] = record.spread(seconds) | {"tokens_per_s": rate, "steps": len(seconds)}
        ours = rows[f"fastguide {name.partition(' ')[2]}"]
        rows[name]["over_fastguide"] = round(rows[name]["ms"] / ours["ms"], 2)
        if name in outside:
            rows[name]["drawn_outside"] = outside[name]
    return rows


def _order(name: str) -> tuple[int, int]:
    """By case, fastguide first."""
    who, _, what = name.partition(" ")
    cases = ["unguided", *CASES]
    return cases.index(what), 0 if who == "fastguide" else 1


def _published_decoder(
    published: Published, case: Method, prompt: list[int], plan: Plan
) -> Callable[[], Timing]:
    return lambda: Timing(published.decode(case, prompt, plan.steps + 1)[1])


def _round(
    plan: Plan, runner: ModelRunner, models: Models, prompt: list[int], outside: dict[str, int]
) -> dict[str, list[float]]:
    """Seconds of the steps of one response from every row in this process, in turns."""
    rules = {"unguided": (Plain(), 0.7)} | {
        n: (rule_of(c), c.temperature) for n, c in CASES.items()
    }
    opened = {
        f"fastguide {name}": open_rows(runner, rule, [prompt], temperature)
        for name, (rule, temperature) in rules.items()
    }
    honest = {f"honest {n}": models.decoding([prompt], case) for n, case in CASES.items()}
    turns: dict[str, Callable[[], object]] = {n: _stepper(runner, r) for n, r in opened.items()}
    turns |= {name: decoding.step for name, decoding in honest.items()}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for begin in range(0, WARM_UP + plan.steps, CHUNK):
        for name, turn in turns.items():
            for step in range(begin, min(begin + CHUNK, WARM_UP + plan.steps)):
                start = time.perf_counter()
                turn()
                if step >= WARM_UP:
                    times[name].append(time.perf_counter() - start)
    for rows in opened.values():
        for row in rows:
            row.close()
    for name in outside:
        outside[name] += honest[name].outside
    return times


def _stepper(runner: ModelRunner, rows: list[Any]) -> Callable[[], object]:
    return lambda: runner.step(rows)
