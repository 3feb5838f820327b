"""What one method's rewards are above another's at equal KL, paired by prompt.

Methods of a study answer the same prompts, and some prompts are easier for all of them: intervals
of two rewards, side by side, hide differences that an interval of the difference shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastguide.evaluate.metrics import t95

Measured = Mapping[int, tuple[float, float]]
"""A point: by prompt, KL in nats and reward."""

Family = Sequence[Sequence[Measured]]
"""Points of a method, of each run of the study; runs differ in their seeds and agree in points."""

Array = NDArray[np.float64]


def differences(
    ours: Family,
    theirs: Family,
    kls: Sequence[float],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Our reward less theirs at each of these KLs, by straight lines between points.

    The spread is that of a bootstrap which draws prompts, the same for both families. With several
    runs it is widened by that of another which draws runs, by the root of the sum of both squares.
    Both are those of means, so intervals are Student's.

    Args:
        ours: as ``Runner.frontier`` gives it, of each run.
        theirs: likewise, of the same runs.
        kls: in nats.
        draws: of each bootstrap.
        seed: of the draws.

    Returns:
        For each KL ``kl``, ``mean`` and ``ci95``, the half-width of the 95 % interval; None outside
        the points of a family.

    Raises:
        ValueError: the families differ in their runs, have fewer than 2 prompts in common, or one
            has fewer than 2 points.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"the families are of {len(ours)} and {len(theirs)} runs; allowed are the same runs"
        )
    every = [point for family in (ours, theirs) for run in family for point in run]
    prompts = sorted(set.intersection(*(set(point) for point in every))) if every else []
    if len(prompts) < 2:
        raise ValueError(f"the points have {len(prompts)} prompts in common; allowed are 2 or more")
    pair = [_values(ours, prompts), _values(theirs, prompts)]
    runs, rng = len(ours), np.random.default_rng(seed)

    def half_width(values: list[Array]) -> Array:
        """Half-widths of the differences' intervals over the last axis of ``[2, points, …]``."""
        number = values[0].shape[-1]
        shares = rng.multinomial(number, np.full(number, 1 / number), draws) / number
        one, other = (_lines(v @ shares.T, kls) for v in values)
        # The variance of a bootstrap is too small by a share of 1 / number.
        return t95(number - 1) * (one - other).std(-1) * math.sqrt(number / (number - 1))

    half = half_width([values.mean(1) for values in pair])
    if runs > 1:
        half = np.hypot(half, half_width([values.mean(3).swapaxes(1, 2) for values in pair]))
    one, other = (values.mean((1, 3)) for values in pair)
    means = (_lines(one[..., None], kls) - _lines(other[..., None], kls))[:, 0]
    low = max(one[0].min(), other[0].min())
    high = min(one[0].max(), other[0].max())
    return [
        {"kl": kl, "mean": float(mean), "ci95": float(ci95)}
        if low <= kl <= high
        else {"kl": kl, "mean": None, "ci95": None}
        for kl, mean, ci95 in zip(kls, means, half, strict=True)
    ]


def difference_table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table of differences, by what they are of, at the same KLs.

    A cell is empty where a family has no points on both sides.
    """
    kls = [entry["kl"] for entry in next(iter(found.values()))]
    lines = [
        "| reward of | " + " | ".join(f"KL = {kl:g}" for kl in kls) + " |",
        "| --- |" + " ---: |" * len(kls),
    ]
    for name, entries in found.items():
        cells = [
            "" if e["mean"] is None else f"{e['mean']:+.3f} ± {e['ci95']:.3f}" for e in entries
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _values(family: Family, prompts: Sequence[int]) -> Array:
    """KL and reward, ``[2, runs, points, prompts]``."""
    counts = {len(run) for run in family}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"the runs of a family have {sorted(counts)} points; allowed is one number from 2"
        )
    values = [[[point[prompt] for prompt in prompts] for point in run] for run in family]
    return np.moveaxis(np.array(values), -1, 0)


def _lines(points: Array, kls: Sequence[float]) -> Array:
    """Rewards ``[KLs, D]`` of points ``[2, P, D]``, by straight lines that go on past their ends.

    A draw whose points end a little before a KL counts, too: else draws would be chosen by KL.
    """
    order = points[0].argsort(0, kind="stable")
    kl, reward = (np.take_along_axis(values, order, 0) for values in points)
    found = []
    for at in kls:
        after = (kl < at).sum(0).clip(1, len(kl) - 1)[None]
        (x0,), (x1,), (y0,), (y1,) = (
            np.take_along_axis(values, where, 0)
            for values in (kl, reward)
            for where in (after - 1, after)
        )
        width = np.where(x1 > x0, x1 - x0, 1.0)  # two points of one KL have one y
        found.append(y0 + (y1 - y0) * (at - x0) / width)
    return np.array(found)
