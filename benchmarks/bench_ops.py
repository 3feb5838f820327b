"""Every op beside what anyone would write instead, and beside the hardware.

    fastguide bench ops [--op NAME] [--rounds 15] [--save NAME]     # a table and a record
    pytest benchmarks --benchmark-only [--benchmark-compare]        # the same cases

Runners of a case take turns within one run, on copies of the inputs that do not fit the caches;
results are checked against the reference before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import op_cases
import pytest
import record
import torch
from op_cases import Case
from rich.console import Console
from rich.table import Table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLICE = 0.01
"""Seconds that one turn of a runner takes at least, as far as one call does not take longer."""


# ------------------------------------------------------------------------------------ timing


def turn(run: Callable[[int], Any], case: Case, calls: int, device: str) -> float:
    """Seconds per call of one turn, walking through the copies."""
    if device != "cpu":
        return _graph_turn(run, case, calls)
    start = time.perf_counter()
    for i in range(calls):
        run(i % case.copies)
    return (time.perf_counter() - start) / calls


def _graph_turn(run: Callable[[int], Any], case: Case, calls: int) -> float:
    """On a GPU calls are replayed from a CUDA graph, so that launches from Python do not count."""
    graph = torch.cuda.CUDAGraph()
    run(0)
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % case.copies)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls * 1e-3


def measure(case: Case, rounds: int, device: str) -> dict[str, Any]:
    """Time all runners of a case in turns; medians with spread, and ours against the others."""
    check(case)
    calls, skipped = {}, {}
    for name, run in list(case.runs.items()):
        try:
            turn(run, case, 1, device)
            calls[name] = max(1, min(200, round(SLICE / turn(run, case, 2, device))))
        except (RuntimeError, NotImplementedError) as error:  # such as no capture in a CUDA graph
            skipped[name] = str(error).splitlines()[0]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, count in calls.items():
            times[name].append(turn(case.runs[name], case, count, device))
    result: dict[str, Any] = {"op": case.op, "shape": case.shape, "bytes": case.bytes}
    result["runs"] = {name: record.spread(t, digits=5) for name, t in times.items()}
    if skipped:
        result["skipped"] = skipped
    ours = result["runs"]["fastguide"]["ms"]
    result["GB_per_s"] = round(case.bytes / ours / 1e6, 2)
    rivals = {name: result["runs"][name]["ms"] for name in case.others if name in times}
    if rivals:
        fastest = min(rivals, key=rivals.__getitem__)
        result |= {"fastest_other": fastest, "speedup": round(rivals[fastest] / ours, 2)}
    for name in case.floors:
        if name in times:
            result.setdefault("over_floor", {})[name] = round(ours / result["runs"][name]["ms"], 2)
    return result


def check(case: Case) -> None:
    """What is timed must be right: it must agree with the reference, in tokens exactly."""
    for one, other in zip(_flat(case.ours(0)), _flat(case.ours(0, "reference")), strict=True):
        near = 2e-2 if one.is_floating_point() else 0
        torch.testing.assert_close(one, other, rtol=near, atol=near, equal_nan=True)


def _flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


# ------------------------------------------------------------------------------ pytest, table


@pytest.fixture(scope="module", params=op_cases.cases(DEVICE), ids=lambda build: _label(build))
def case(request: pytest.FixtureRequest) -> Case:
    """One case after the other, checked."""
    built: Case = request.param()
    check(built)
    return built


def _label(build: Any) -> str:
    return "-".join([build.func.__name__.removesuffix("_case"), *map(str, build.args)])


@pytest.mark.parametrize("who", ["fastguide", "other"])
def test_op(benchmark: Any, case: Case, who: str) -> None:
    """An op, and the usual way to do without it."""
    run = case.ours if who == "fastguide" else next(iter(case.others.values()))
    benchmark.group = str(case)
    benchmark.extra_info["bytes"] = case.bytes
    turns = itertools.count()

    def once() -> None:
        run(next(turns) % case.copies)
        if DEVICE != "cpu":
            torch.cuda.synchronize()

    benchmark(once)


def show(results: list[dict[str, Any]], bandwidth: float) -> None:
    """A line per case."""
    table = Table("op", "shape", "ms (p20-p80)", "of read", "fastest other", "speed-up", "floor")
    for r in results:
        ours = r["runs"]["fastguide"]
        times = f"{ours['ms']:.4g} ({ours['p20_ms']:.4g}-{ours['p80_ms']:.4g})"
        rival = r.get("fastest_other", "")
        other = f"{rival}: {r['runs'][rival]['ms']:.4g}" if rival else ""
        floors = ", ".join(f"{v:.2f} x {n}" for n, v in r.get("over_floor", {}).items())
        share = f"{r['GB_per_s'] / bandwidth:.0%}"
        speedup = f"{r['speedup']:.2f}" if rival else ""
        table.add_row(r["op"], r["shape"], times, share, other, speedup, floors)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(words: list[str] | None = None) -> None:
    """Run the benchmark and, with --save, keep its record."""
    parser = argparse.ArgumentParser("fastguide bench ops", description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="only cases whose op, or op and sizes, contain this")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every runner")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(words)
    chosen = [b for b in op_cases.cases(DEVICE) if not options.op or options.op in _label(b)]
    if not chosen:
        labels = {_label(b).split("-")[0] for b in op_cases.cases(DEVICE)}
        parser.error(f"--op is {options.op!r}; there are {', '.join(sorted(labels))}")
    roofs = record.rooflines(torch.bfloat16, DEVICE)
    results = []
    for build in chosen:
        results.append(measure(build(), options.rounds, DEVICE))
        print(f"{results[-1]['op']} {results[-1]['shape']}: done", file=sys.stderr, flush=True)
    show(results, roofs["read_GB_per_s"])
    whole = {
        "benchmark": "ops",
        "environment": record.environment(DEVICE),
        "rooflines": roofs,
        "results": results,
    }
    if options.save:
        print(f"record: {record.save(options.save, whole)}")


if __name__ == "__main__":
    main()
