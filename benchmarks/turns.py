"""Several things timed in one run: they take turns, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], object]
WARM_UP = 4
"""First turns, which are not counted."""


def take_turns(steps: Mapping[str, Step], count: int, device: str) -> dict[str, list[float]]:
    """Seconds of ``count`` steps of each, one of each in turn.

    What a step returns must be on the host already, or ``device`` is waited for.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(count + WARM_UP):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize(device)
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median of the ratios of steps that were neighbours."""
    pairs = zip(times[name], times[to], strict=True)
    return statistics.median(a / b for a, b in pairs)
