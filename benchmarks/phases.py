"""Where the time of a step goes: seconds of each phase, by the clock, without what it calls."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from engines import load
from rich.console import Console
from rich.table import Table
from shapes import prompt_tokens

from fastguide import VAS, Plain, SamplingParams
from fastguide.cache import CachedSequence
from fastguide.engine import Engine, loop, runner, samples
from fastguide.models import decoder
from fastguide.models.decoder import Decoder
from fastguide.scorer import TreeScorer

HOST = (
    "host: queues",
    "host: rows, branches, scores",
    "host: layout of a pass",
    "host: slots, tokens",
    "host: texts, completions",
)
"""All that is neither a model nor an op."""

NAMED = 0.02
"""Smaller shares are not printed."""


class Phases:
    """While active, notes the time spent in each phase of ``Engine``'s steps.

    On a GPU it waits for the device at the end of each phase, so that its time is its own: phases
    add up to more than a step takes that nobody looks at.
    """

    def __init__(self, engine: Engine) -> None:
        self.seconds: Counter[str] = Counter()
        self._policy = engine.runner.policy
        self._decoders = list({id(d): d for d in engine.loop.caches.decoders.values()}.values())
        self._stack: list[str] = []
        self._since = 0.0
        self._device = engine.runner.policy.device

    def _parts(self) -> Counter[str]:
        """Time spent so far in the parts of native stacks, which the clock sees as one."""
        found: Counter[str] = Counter()
        for decoder_ in self._decoders:
            whose = self._of("layers")(decoder_)
            for part, seconds in decoder_.seconds.items():
                found[f"{whose}: {part}"] += seconds
        return found

    def _mark(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def _timed(self, function: Callable[..., Any], name: Any) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self._mark()
            self._stack.append(name if isinstance(name, str) else name(arguments[0]))
            try:
                return function(*arguments, **options)
            finally:
                self._mark()
                self._stack.pop()

        return call

    def _of(self, layers_or_head: str) -> Callable[[Decoder], str]:
        return lambda d: f"{'policy' if d is self._policy else 'guides'}: {layers_or_head}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Note times from here on."""
        places: list[tuple[Any, str, Any]] = [
            (loop.Loop, "step", "host: queues"),
            (runner.ModelRunner, "step", "host: rows, branches, scores"),
            (Decoder, "_forward", "host: layout of a pass"),
            (Decoder, "_layers", self._of("layers")),
            (Decoder, "_whole", self._of("layers")),
            (Decoder, "logits", self._of("head")),
            (TreeScorer, "values", "guides: heads"),
            (runner, "top_candidates", "ops: candidates"),
            (runner, "sample", "ops: combine, sample"),
            (decoder, "_commit", "host: slots, tokens"),
            (CachedSequence, "append", "host: slots, tokens"),
            (samples.Sample, "take", "host: texts, completions"),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
        for owner, name, phase in places:
            setattr(owner, name, self._timed(getattr(owner, name), phase))
        begun = self._parts()
        try:
            yield
        finally:
            for name, seconds in (self._parts() - begun).items():
                self.seconds[name] += seconds
                self.seconds[name.rpartition(": ")[0]] -= seconds
            for owner, name, function in before:
                setattr(owner, name, function)


def shares(seconds: Counter[str]) -> dict[str, float]:
    """The share of each phase, largest first, and of the host altogether."""
    total = sum(seconds.values())
    found = {name: round(s / total, 4) for name, s in seconds.most_common()}
    return found | {"host altogether": round(sum(seconds[name] for name in HOST) / total, 4)}


def profile(
    folder: Path, device: str, *, batch: int, prompt: int, new_tokens: int
) -> dict[str, dict[str, float]]:
    """The share of each phase of a step, unguided and by the way a guide runs.

    Args:
        folder: of ``engines.write_models``.
        device: where.
        batch: requests at once.
        prompt: tokens of each; they are in the prefix cache, so that steps decode.
        new_tokens: of each.
    """
    found = {}
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True, seed=1)
    prompts = [prompt_tokens(i, prompt) for i in range(batch)]
    for name, guide, way in (
        ("unguided", "equal", "auto"),
        ("two-phase", "equal", "auto"),
        ("one-pass", "lora", "one-pass"),
        ("trunk", "trunk", "auto"),
    ):
        engine = load(folder, device, guide, way=way)
        rule = Plain() if name == "unguided" else VAS(beta=4.0, k=20)
        weights = {guide: 1.0} if rule.guided else None
        engine.generate(prompts, rule, weights, sampling, progress=False)
        phases = Phases(engine)
        with phases.active():
            engine.generate(prompts, rule, weights, sampling, progress=False)
        found[name] = shares(phases.seconds)
    return found


def show_profile(found: dict[str, dict[str, float]]) -> None:
    """Print every phase above ``NAMED`` of a step, and the host altogether."""
    names = list(dict.fromkeys(name for phases in found.values() for name in phases))
    table = Table("phase", *found, title="share of a step")
    for name in names:
        if max(phases.get(name, 0.0) for phases in found.values()) >= NAMED:
            table.add_row(name, *(f"{phases.get(name, 0.0):.1%}" for phases in found.values()))
    Console().print(table)
