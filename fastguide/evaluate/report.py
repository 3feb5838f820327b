"""Results as a Markdown table and as plots."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from fastguide.evaluate.metrics import matched, t95

Result = dict[str, Any]

COSTS = ("policy_flops", "guide_flops", "judge_flops", "seconds_per_response")
"""What a result says an answer takes."""

WIDE = 16.0
"""A setting whose largest value is more than so many times its smallest has a logarithmic axis."""

_COLUMNS = {
    "reward": ("reward", "{:+.3f}"),
    "kl": ("KL, nats", "{:.2f}"),
    "tokens": ("tokens", "{:.0f}"),
    "diversity": ("diversity", "{:.3f}"),
    "coherence": ("coherence", "{:.3f}"),
    "win_rate": ("win rate", "{:.0%}"),
    "judged": ("judged", "{:.0%}"),
}
"""What a result may have an estimate of: heading and form."""


def table(results: Sequence[Result]) -> str:
    """All points, one line each; ± is the half-width of a 95 % interval."""
    other = [name for r in results for name in r if _is_estimate(r[name]) and name not in _COLUMNS]
    columns = {"reward": _COLUMNS["reward"]}
    columns |= {name: (name.replace("_", " "), "{:+.3f}") for name in dict.fromkeys(other)}
    columns |= {n: c for n, c in _COLUMNS.items() if any(n in r for r in results)}
    heads = [head for head, _ in columns.values()]
    lines = [
        "| point | " + " | ".join([*heads, "GFLOP", "s"]) + " |",
        "| --- |" + " ---: |" * (len(columns) + 2),
    ]
    for r in results:
        cells = [_cell(r.get(name), form) for name, (_, form) in columns.items()]
        work = sum(r[name] for name in COSTS if name.endswith("flops")) / 1e9
        cells += [f"{work:.3g}", f"{r['seconds_per_response']:.3g}"]
        lines.append(f"| {r['point']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def at_equal_kl(results: Sequence[Result], kls: Sequence[float], *, y: str = "reward") -> str:
    """A Markdown table of each method's reward at given KLs, by straight lines between its points.

    A cell is empty where a method has no points on both sides.
    """
    lines = [
        "| method | " + " | ".join(f"KL = {kl:g}" for kl in kls) + " |",
        "| --- |" + " ---: |" * len(kls),
    ]
    for method, points in _by_method(results).items():
        points = _measured(points, "kl", y)
        x = [p["kl"]["mean"] for p in points]
        means, halves = ([p[y][key] or 0.0 for p in points] for key in ("mean", "ci95"))
        cells = []
        for kl in kls:
            mean, half = matched(x, means, at=kl), matched(x, halves, at=kl)
            cells.append("" if mean is None or half is None else f"{mean:+.3f} ± {half:.3f}")
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pooled(runs: Sequence[Sequence[Result]]) -> list[Result]:
    """One result per point from several runs of a study with other seeds.

    Runs share their prompts, so a pooled interval is that of a run, widened by that of the mean of
    the runs (Student's, too): the root of the sum of both squares.
    """
    found = []
    for results in zip(*runs, strict=True):
        first = dict(results[0])
        for name, value in first.items():
            if _is_estimate(value):
                first[name] = _pooled([result[name] for result in results])
            elif name in (*COSTS, "tokens_per_second"):
                first[name] = statistics.fmean(result[name] for result in results)
            elif name == "failed":
                first[name] = sum(result[name] for result in results)
        found.append(first | {"runs": len(results)})
    return found


def _pooled(estimates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means = [e["mean"] for e in estimates if e["mean"] is not None]
    if not means:
        return dict(estimates[0])
    within = statistics.fmean(e["ci95"] or 0.0 for e in estimates)
    beyond = 0.0
    if len(means) > 1:
        beyond = t95(len(means) - 1) * statistics.stdev(means) / math.sqrt(len(means))
    return {
        "mean": statistics.fmean(means),
        "ci95": math.hypot(within, beyond),
        "responses": sum(e["responses"] for e in estimates),
    }


def _is_estimate(value: Any) -> bool:
    return isinstance(value, Mapping) and "ci95" in value


def _cell(estimate: Mapping[str, Any] | None, form: str) -> str:
    if estimate is None or estimate["mean"] is None:
        return ""
    mean = form.format(estimate["mean"])
    if not estimate["ci95"]:
        return mean
    return f"{mean} ± {form.replace('+', '').format(estimate['ci95'])}"


def frontier(
    results: Sequence[Result], file: str | Path, *, y: str = "reward", title: str = ""
) -> None:
    """KL against a reward, a line with its 95 % band per method."""
    axes, figure = _axes()
    for method, points in _by_method(results).items():
        points = sorted(_measured(points, "kl", y), key=lambda p: p["kl"]["mean"])
        if points:
            _line(axes, [p["kl"]["mean"] for p in points], [p[y] for p in points], method)
    axes.set_xscale("symlog", linthresh=1.0)
    low, high = axes.get_xlim()
    ticks = [0.0, *(m * 10.0**e for e in range(-1, 4) for m in (1, 2, 5) if m * 10.0**e >= 0.2)]
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) > 2:
        axes.set_xticks(shown, minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
    _finish(figure, axes, "KL from the policy, nats per response", y, title, file)


def sweep(
    results: Sequence[Result], setting: str, file: str | Path, *, y: str = "reward", title: str = ""
) -> None:
    """A setting such as beta or k against an estimate, a line per method that has it."""
    axes, figure = _axes()
    seen: set[float] = set()
    for method, points in _by_method(results).items():
        points = sorted(
            (p for p in _measured(points, y) if isinstance(p["setting"].get(setting), Real)),
            key=lambda p: p["setting"][setting],
        )
        if points:
            where = [p["setting"][setting] for p in points]
            seen.update(where)
            _line(axes, where, [p[y] for p in points], method)
    if seen and min(seen) > 0 and max(seen) > WIDE * min(seen):
        axes.set_xscale("log")
        axes.set_xticks(sorted(seen), [f"{x:g}" for x in sorted(seen)], minor=False)
        axes.minorticks_off()
    _finish(figure, axes, setting, y, title, file)


def _measured(points: Sequence[Result], *names: str) -> list[Result]:
    """Those that have estimates of all these."""
    return [p for p in points if all(n in p and p[n]["mean"] is not None for n in names)]


def _by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result["method"]].append(result)
    return groups


def matplotlib() -> tuple[Any, Any]:
    """Its figure and canvas, or how to get them."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fastguide[evaluate]'") from error
    return Figure, FigureCanvasAgg


def _axes() -> tuple[Any, Any]:
    figure_class, canvas = matplotlib()
    figure = figure_class(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    canvas(figure)
    return figure.add_subplot(), figure


def _line(axes: Any, x: Sequence[float], estimates: Sequence[Mapping[str, Any]], name: str) -> None:
    mean = [e["mean"] for e in estimates]
    half = [e["ci95"] or 0.0 for e in estimates]
    (line,) = axes.plot(x, mean, marker="o", markersize=4, label=name)
    low, high = ([m + s * h for m, h in zip(mean, half, strict=True)] for s in (-1, 1))
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _finish(figure: Any, axes: Any, x: str, y: str, title: str, file: str | Path) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y.replace("_", " "))
    axes.grid(alpha=0.3)
    if title:
        axes.set_title(title)
    if len(axes.get_lines()) > 1:
        axes.legend()
    figure.savefig(file, metadata={"Software": None})
