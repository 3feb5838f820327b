"""How the cost of a step grows: with requests, candidates, the prefix, and the size of the guide.

    python benchmarks/bench_sweeps.py [--sweep batch k prefix guide] [--save NAME]

Everything else is as in ``bench_ways.py``: a Llama of 110 M parameters with random weights, bf16,
prompt 256, k = 20, one request. The cases of each point take turns step by step. ``--save`` also
draws ``NAME-SWEEP.png`` beside the record.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import record
import torch
from bench_ways import Case, build_cases, build_guide, measure
from rich.console import Console
from rich.table import Table
from shapes import SHAPE, Shape

BATCHES = (1, 2, 4, 8, 16, 32)
CANDIDATES = (5, 10, 20, 50, 100)
PREFIXES = (128, 256, 512, 1_024, 2_048, 4_096)
WIDTHS = (192, 384, 768)
"""Of guides: 7, 23 and 110 M parameters."""
Roof = dict[str, float]
MAIN = ("unguided", "two-phase, equal guide", "one-pass, LoRA", "trunk")


def peak(device: str) -> float:
    """Most memory so far, in GB: of the device, or of this process."""
    if device != "cpu":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


Points = Iterator[tuple[int, dict[str, dict[str, Any]]]]
"""Of a sweep: where, and what ``bench_ways.measure`` found there."""


def sweep_batch(cases: Mapping[str, Case], asked: argparse.Namespace, roof: Roof) -> Points:
    """More requests at once."""
    for batch in asked.batches:
        yield batch, measure(cases, asked, roof, batch=batch)


def sweep_k(cases: Mapping[str, Case], asked: argparse.Namespace, roof: Roof) -> Points:
    """More candidates."""
    for k in asked.candidates:
        yield k, measure(cases, asked, roof, k=k)


def sweep_prefix(cases: Mapping[str, Case], asked: argparse.Namespace, roof: Roof) -> Points:
    """Longer prompts."""
    for prompt in asked.prefixes:
        yield prompt, measure(cases, asked, roof, prompt=prompt)


def sweep_guide(cases: Mapping[str, Case], asked: argparse.Namespace, roof: Roof) -> Points:
    """Larger guides with weights of their own; points are named by their parameters."""
    unguided = cases["unguided"]
    for width in WIDTHS:
        guide, case = build_guide(unguided.runner.policy, shape_of(width), asked.device)
        yield guide, measure({"unguided": unguided, "two-phase": case}, asked, roof)


def shape_of(width: int) -> Shape:
    """A guide of another width, with heads of 64 and as many layers as it is wide."""
    heads = width // 64
    return SHAPE | dict(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=heads,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


SWEEPS = {"batch": sweep_batch, "k": sweep_k, "prefix": sweep_prefix, "guide": sweep_guide}


def fits(points: list[dict[str, Any]], roof: dict[str, float]) -> dict[str, dict[str, float]]:
    """Straight lines through milliseconds over the prefix, and what reading the cache explains.

    Each model that has a cache of its own reads the keys and values of the prefix once per pass.
    """
    width, layers = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
    each = 1e3 * layers * 2 * width * 2 / (1e9 * roof["read_GB_per_s"])  # ms per token and cache
    caches = {"unguided": 1, "two-phase, equal guide": 2, "one-pass, LoRA": 2, "trunk": 1}
    xs = [p["at"] for p in points]
    found = {}
    for name, count in caches.items():
        ys = [p["cases"][name]["ms"] for p in points]
        slope, constant = statistics.linear_regression(xs, ys)
        found[name] = {
            "ms_at_0": round(constant, 3),
            "us_per_token": round(1e3 * slope, 3),
            "us_per_token_of_reading": round(1e3 * count * each, 3),
            "correlation": round(statistics.correlation(xs, ys), 4),
        }
    return found


def draw(sweep: str, points: list[dict[str, Any]], path: Any) -> None:
    """Milliseconds per step over what was swept, both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    xs = [p["at"] for p in points]
    for name in points[0]["cases"]:
        runs = [p["cases"][name] for p in points]
        (line,) = axes.plot(xs, [r["ms"] for r in runs], marker="o", label=name)
        low, high = [r["p20_ms"] for r in runs], [r["p80_ms"] for r in runs]
        axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=LABELS[sweep], ylabel="ms per step")
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


LABELS = {
    "batch": "requests",
    "k": "candidates",
    "prefix": "tokens of the prompt",
    "guide": "parameters of the guide",
}


def main() -> None:
    """Run the sweeps and, with --save, keep their record and draw them."""
    parser = record.parser(__doc__)
    parser.add_argument("--sweep", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--candidates", type=int, nargs="+", default=CANDIDATES)
    parser.add_argument("--prefixes", type=int, nargs="+", default=PREFIXES)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24)
    asked = parser.parse_args()
    whole: dict[str, Any] = {
        "benchmark": "sweeps",
        "environment": record.environment(asked.device),
        "rooflines": record.rooflines(torch.bfloat16, asked.device),
        "shape": SHAPE | {"dtype": "bfloat16", "prompt": asked.prompt, "k": asked.k},
        "sweeps": {},
    }
    console = Console()
    cases = {name: c for name, c in build_cases(asked.device).items() if name in MAIN}
    for sweep in asked.sweep:
        points = []
        for at, found in SWEEPS[sweep](cases, asked, whole["rooflines"]):
            points.append({"at": at, "cases": found, "peak_GB": peak(asked.device)})
        whole["sweeps"][sweep] = points
        table = Table(LABELS[sweep], *points[0]["cases"], title="ms per step, / unguided")
        for p in points:
            runs = p["cases"].values()
            table.add_row(f"{p['at']:,}", *(f"{r['ms']:.1f}, {r['over_unguided']}" for r in runs))
        console.print(table)
        if sweep == "prefix" and len(points) > 1:
            whole["prefix_fit"] = fits(points, whole["rooflines"])
            console.print(whole["prefix_fit"])
    if asked.save:
        path = record.save(asked.save, whole)
        for sweep, points in whole["sweeps"].items():
            draw(sweep, points, path.with_name(f"{path.stem}-{sweep}.png"))
        print(f"record: {path}")


if __name__ == "__main__":
    main()
