"""Many requests in one engine: how much sooner they end, how long each waits, what the host costs.

    python benchmarks/bench_serving.py [--part mixed latency profile adaptive] [--save NAME]

Mixed, latency and profile decode a Llama of 110 M parameters with random weights in bf16, guided by
another of the same shape; adaptive decodes the packaged story model with its packaged guide.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
from engines import load, write_models
from phases import profile, show_profile
from rich.console import Console
from rich.table import Table
from shapes import SHAPE, Shape, prompt_tokens

from fastguide import VAS, Engine, Plain, SamplingParams
from fastguide.rewards import Sample, load_reward

RULE = VAS(beta=4.0, k=20)
MASS = 0.95
CONCURRENT = (1, 4, 16, 64)
STARTS = (
    "Once upon a time, there was a little girl named Lily.",
    "One day, a boy named Tom went to the park.",
    "The dog was sad because",
    "Sara and Ben found a big box in the garden.",
)


def mixed(folder: Path, asked: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Requests of many lengths: all in one batch, and one after the other."""
    engine = load(folder, asked.device, "equal", prefix_cache=False)
    prompts, samplings = [], []
    for i in range(asked.requests):
        prompts.append(prompt_tokens(i, 16 + (37 * i) % 241, shape))
        new = 8 + (29 * i) % 57
        samplings.append(SamplingParams(max_tokens=new, seed=i, ignore_eos=True))
    rules = [RULE if i % 4 else Plain() for i in range(asked.requests)]
    weights = [{"equal": 1.0} if rule.guided else None for rule in rules]
    tokens = sum(s.max_tokens for s in samplings)
    found: dict[str, list[float]] = {"together": [], "one by one": []}
    for _ in range(asked.rounds):
        start = time.perf_counter()
        engine.generate(prompts, rules, weights, samplings, progress=False)
        found["together"].append(time.perf_counter() - start)
        start = time.perf_counter()
        for request in zip(prompts, rules, weights, samplings, strict=True):
            engine.generate(*request, progress=False)
        found["one by one"].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    return {
        "requests": asked.requests,
        "tokens": tokens,
        "seconds": {name: round(statistics.median(s), 3) for name, s in found.items()},
        "sooner": round(statistics.median(ratios), 2),
    }


def latency(folder: Path, asked: argparse.Namespace, shape: Shape) -> list[dict[str, Any]]:
    """From a request's arrival to its first token, and from one token to the next."""
    engine = load(folder, asked.device, "equal", prefix_cache=False)
    sampling = SamplingParams(max_tokens=asked.new_tokens, ignore_eos=True)
    found = []
    for count in asked.concurrent:
        first, between = [], []
        requests = [
            engine.request(prompt_tokens(i, asked.prompt, shape), RULE, {"equal": 1.0}, sampling)
            for i in range(count)
        ]
        began = time.perf_counter()
        last: dict[int, float] = {}
        for request in requests:
            engine.loop.add(request)
        while not engine.loop.idle:
            events = engine.loop.step()
            now = time.perf_counter()
            for event in events:
                key = id(event.completion)
                if key in last:
                    between.append(now - last[key])
                else:
                    first.append(now - began)
                last[key] = now
        spent = time.perf_counter() - began
        found.append(
            {
                "requests": count,
                "tokens_per_s": round(count * asked.new_tokens / spent, 1),
                "first_ms": percentiles(first),
                "between_ms": percentiles(between),
            }
        )
    return found


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds that half, nine in ten and 99 in a hundred do not exceed."""
    ordered = sorted(seconds)
    return {
        f"p{p}": round(1e3 * ordered[min(len(ordered) - 1, p * len(ordered) // 100)], 2)
        for p in (50, 90, 99)
    }


def adaptive(asked: argparse.Namespace) -> dict[str, Any]:
    """Rows scored, reward and time with candidates that hold a share of the mass, and with all."""
    reward = load_reward("cheerfulness")
    starts = [STARTS[i % len(STARTS)] for i in range(asked.stories)]
    sampling = SamplingParams(temperature=0.7, max_tokens=96, seed=7, n=asked.samples)
    found: dict[str, Any] = {}
    for way in ("two-phase", "one-pass", "auto"):
        engine = Engine(device=asked.device, dtype="float32", way=way)
        runs = {"unguided": Plain(), "all": RULE, f"mass {MASS}": VAS(4.0, 20, candidate_mass=MASS)}
        done = {}
        for name, rule in runs.items():
            weights = {"cheerful": 1.0} if rule.guided else None
            outputs = engine.generate(starts, rule, weights, sampling, progress=False)
            rewards = reward([Sample(starts[c.prompt], c.text, len(c.token_ids)) for c in outputs])
            scored = [n for c in outputs for n in c.scored]
            done[name] = {
                "reward": round(statistics.mean(rewards), 4),
                "reward_error": round(statistics.stdev(rewards) / len(rewards) ** 0.5, 4),
                "scored_per_step": round(statistics.mean(scored), 2),
            }
        steps = one_story(engine, runs, asked)
        for name, seconds in steps.items():
            done[name] |= record.spread(seconds)
            pairs = zip(seconds, steps["unguided"], strict=True)
            done[name]["over_unguided"] = round(statistics.median(a / b for a, b in pairs), 2)
        found[way] = done
    return found


def one_story(
    engine: Engine, runs: dict[str, Any], asked: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds per token of one request, all settings in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(asked.rounds * 4 + 1):
        sampling = SamplingParams(temperature=0.7, max_tokens=64, seed=i, ignore_eos=True)
        for name, rule in runs.items():
            weights = {"cheerful": 1.0} if rule.guided else None
            start = time.perf_counter()
            engine.generate(STARTS[i % len(STARTS)], rule, weights, sampling, progress=False)
            if i:
                times[name].append((time.perf_counter() - start) / 64)
    return times


def show(found: dict[str, Any]) -> None:
    """Print what was found."""
    console = Console()
    if "mixed" in found:
        m = found["mixed"]
        console.print(f"{m['requests']} mixed requests end {m['sooner']} times sooner together")
    if "latency" in found:
        table = Table("requests", "tokens/s", "first token, ms p50/p90/p99", "between, ms")
        for r in found["latency"]:
            cells = [
                "/".join(f"{x:.0f}" for x in r[k].values()) for k in ("first_ms", "between_ms")
            ]
            table.add_row(str(r["requests"]), f"{r['tokens_per_s']:.1f}", *cells)
        console.print(table)
    if "profile" in found:
        show_profile(found["profile"]["shares"])
    if "adaptive" in found:
        table = Table("way", "candidates", "scored", "reward", "ms/token", "/ unguided")
        for way, runs in found["adaptive"].items():
            for name, r in runs.items():
                reward = f"{r['reward']:.3f} ± {1.96 * r['reward_error']:.3f}"
                cells = (
                    f"{r['scored_per_step']}",
                    reward,
                    f"{r['ms']:.2f}",
                    f"{r['over_unguided']}",
                )
                table.add_row(way, name, *cells)
        console.print(table)


def main() -> None:
    """Run the benchmark and, with --save, keep its record."""
    parts = ("mixed", "latency", "profile", "adaptive")
    parser = record.parser(__doc__)
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--requests", type=int, default=64, help="mixed ones")
    parser.add_argument("--concurrent", type=int, nargs="+", default=CONCURRENT)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4, help="of each story")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    whole: dict[str, Any] = {
        "benchmark": "serving",
        "environment": record.environment(asked.device),
        "shape": SHAPE | {"dtype": "bfloat16", "prompt": asked.prompt, "k": RULE.k},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if set(asked.part) & {"mixed", "latency", "profile"}:
            write_models(folder)
        for part, run in (("mixed", mixed), ("latency", latency)):
            if part in asked.part:
                whole[part] = run(folder, asked, SHAPE)
        if "profile" in asked.part:
            sizes = {"batch": 16, "prompt": asked.prompt, "new_tokens": asked.new_tokens}
            whole["profile"] = sizes | {"shares": profile(folder, asked.device, **sizes)}
    if "adaptive" in asked.part:
        whole["adaptive"] = adaptive(asked)
    show(whole)
    if asked.save:
        print(f"record: {record.save(asked.save, whole)}")


if __name__ == "__main__":
    main()
