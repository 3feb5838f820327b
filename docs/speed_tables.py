"""The tables of speed in README and docs, from the records of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPEED = Path(__file__).resolve().parents[1] / "benchmarks/results"
NOTHING = "No record has it yet."


def records(benchmark: str) -> list[dict[str, Any]]:
    """What was recorded of a benchmark, on all devices."""
    every = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(SPEED.glob("*.json"))]
    return [record for record in every if record.get("benchmark") == benchmark]


def speed() -> str:
    """Guided against unguided steps, from the engine benchmark's records."""
    lines = [
        "| device | batch | unguided, ms | guided, ms | guided / unguided |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for record in records("engine"):
        device = record["environment"]["device"]
        lines += [
            f"| {device} | {r['batch']} | {r['unguided']['ms']:.1f} | {r['guided']['ms']:.1f} "
            f"| {r['guided_over_unguided']:.2f} |"
            for r in record["results"]
        ]
    return "\n".join(lines)


def baselines() -> str:
    """The same work done by others, from those records of the engine's benchmark that have it."""
    lines = []
    for record in records("engine"):
        if "baselines" not in record:
            continue
        environment, found = record["environment"], record["baselines"]
        versions = ", ".join(f"{name} {version}" for name, version in found["published"].items())
        lines += [
            f"{environment['device']}, {environment['threads']} threads, torch "
            f"{environment['torch']}, transformers {environment['transformers']}, prompt of "
            f"{found['prompt']} tokens, {found['rounds']} times {found['new_tokens']} new ones"
            f"{f'; published: {versions}' if versions else ''}.",
            "",
            "| row | ms per token (p20 to p80) | tokens/s | / fastguide |",
            "| --- | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {name} | {r['ms']:.1f} ({r['p20_ms']:.1f} to {r['p80_ms']:.1f}) "
            f"| {r['tokens_per_s']:.1f} | {r['over_fastguide']:.2f} |"
            for name, r in found["rows"].items()
        ]
        lines.append("")
    return "\n".join(lines).rstrip() or "No record has them yet."


def ops() -> str:
    """Every op beside its fastest rival, from the op benchmark's records."""
    lines = []
    for record in records("ops"):
        environment = record["environment"]
        lines += [
            f"{environment['device']}, {environment['threads']} threads, torch "
            f"{environment['torch']}, medians; reading memory reaches "
            f"{record['rooflines']['read_GB_per_s']:.0f} GB/s.",
            "",
            "| op | case | ms | fastest other | ms | speed-up | lower bound |",
            "| --- | --- | ---: | --- | ---: | ---: | --- |",
        ]
        for r in record["results"]:
            other = r.get("fastest_other", "")
            floors = ", ".join(f"{x:.2f} × {name}" for name, x in r.get("over_floor", {}).items())
            lines.append(
                f"| {r['op']} | {r['shape']} | {r['runs']['fastguide']['ms']:.4g} | {other} "
                f"| {r['runs'][other]['ms']:.4g} | {r['speedup']:.2f} | {floors} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def training() -> str:
    """Training steps beside a plain trainer's, from the training benchmark's records."""
    lines = [
        "| device | case | fastguide, ms | / language model | / token classifier |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for record in records("train"):
        device = record["environment"]["device"]
        for r in record["results"]:
            ratios = [
                r[f"over {other}"]["median"] for other in ("language model", "token classifier")
            ]
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(f"| {device} | {r['case']} | {r['fastguide']['ms']:.0f} | {cells} |")
    return "\n".join(lines)


def about(record: dict[str, Any]) -> str:
    """Where a record was made."""
    environment, shape = record["environment"], record["shape"]
    text = (
        f"{environment['device']}, {environment['threads']} threads, torch "
        f"{environment['torch']}, {shape['dtype']}, prompt {shape['prompt']}, k = {shape['k']}"
    )
    roof = record.get("rooflines")
    if roof is None:
        return f"{text}."
    return (
        f"{text}; reading reaches {roof['read_GB_per_s']:.0f} GB/s and multiplying "
        f"{roof['matmul_GFLOP_per_s']:.0f} GFLOP/s."
    )


def ways() -> str:
    """A step by the way that the guide runs."""
    lines = []
    for record in records("ways"):
        lines += [
            about(record),
            "",
            "| requests | case | ms per step (p20 to p80) | / unguided | floor, ms | of it |",
            "| ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for result in record["results"]:
            lines += [
                f"| {result['batch']} | {name} | {r['ms']:.1f} ({r['p20_ms']:.1f} to "
                f"{r['p80_ms']:.1f}) | {r['over_unguided']:.2f} | {r['floor_ms']:.1f} "
                f"| {r['of_floor']:.0%} |"
                for name, r in result["cases"].items()
            ]
        lines.append("")
    return "\n".join(lines).rstrip() or NOTHING


SWEPT = {
    "batch": "requests",
    "k": "candidates",
    "prefix": "tokens of the prompt",
    "guide": "parameters of the guide",
}


def sweeps() -> str:
    """Milliseconds per step over what was swept, and what they are over an unguided step."""
    lines = []
    for record in records("sweeps"):
        lines += [about(record), ""]
        for sweep, points in record["sweeps"].items():
            names = list(points[0]["cases"])
            lines += [
                f"| {SWEPT[sweep]} | {' | '.join(names)} |",
                f"| ---: |{' ---: |' * len(names)}",
            ]
            for p in points:
                cells = [f"{r['ms']:.1f} ({r['over_unguided']:.2f})" for r in p["cases"].values()]
                lines.append(f"| {p['at']:,} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines).rstrip() or NOTHING


def prefix_fit() -> str:
    """Lines through the sweep over prefixes, beside the time that reading their cache takes."""
    lines = []
    for record in records("sweeps"):
        if "prefix_fit" not in record:
            continue
        lines += [
            "| case | ms without a prefix | µs per token | of which reading the cache | r |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {name} | {f['ms_at_0']:.1f} | {f['us_per_token']:.2f} "
            f"| {f['us_per_token_of_reading']:.2f} | {f['correlation']:.3f} |"
            for name, f in record["prefix_fit"].items()
        ]
        lines.append("")
    return "\n".join(lines).rstrip() or NOTHING


def mixed() -> str:
    """Requests of many lengths together and one by one, and how long each waits."""
    lines = []
    for record in records("serving"):
        found = record["mixed"]
        seconds = found["seconds"]
        lines += [
            f"{about(record)} {found['requests']} requests of mixed lengths, {found['tokens']:,} "
            f"new tokens: {seconds['together']:.1f} s together, {seconds['one by one']:.1f} s one "
            f"by one, {found['sooner']:.1f} times sooner.",
            "",
            "| requests | tokens/s | first token, ms: p50 | p90 | p99 | token to token, ms: p50 "
            "| p90 | p99 |",
            f"|{' ---: |' * 8}",
        ]
        for r in record["latency"]:
            waits = [*r["first_ms"].values(), *r["between_ms"].values()]
            cells = " | ".join(f"{wait:.0f}" for wait in waits)
            lines.append(f"| {r['requests']} | {r['tokens_per_s']:.1f} | {cells} |")
        lines.append("")
    return "\n".join(lines).rstrip() or NOTHING


def profile() -> str:
    """Every phase of a step that takes more than one part in fifty."""
    lines = []
    for record in records("serving"):
        shares = record["profile"]["shares"]
        names = list(dict.fromkeys(name for phases in shares.values() for name in phases))
        lines += [
            f"{record['environment']['device']}, {record['profile']['batch']} requests.",
            "",
            f"| phase | {' | '.join(shares)} |",
            f"| --- |{' ---: |' * len(shares)}",
        ]
        for name in names:
            own = [phases.get(name, 0.0) for phases in shares.values()]
            if max(own) >= 0.02:
                lines.append(f"| {name} | {' | '.join(f'{share:.1%}' for share in own)} |")
        lines.append("")
    return "\n".join(lines).rstrip() or NOTHING


def adaptive() -> str:
    """Candidates that hold a share of the mass beside all of them, on the packaged models."""
    lines = []
    for record in records("serving"):
        lines += [
            f"{record['environment']['device']}, fp32, one request.",
            "",
            "| way | candidates | scored per step | reward | ms per token | / unguided |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for way, runs in record["adaptive"].items():
            lines += [
                f"| {way} | {name} | {r['scored_per_step']:.1f} | {r['reward']:+.3f} ± "
                f"{1.96 * r['reward_error']:.3f} | {r['ms']:.2f} | {r['over_unguided']:.2f} |"
                for name, r in runs.items()
            ]
        lines.append("")
    return "\n".join(lines).rstrip() or NOTHING


PERFORMANCE = "docs/performance.md"
SPEED_TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "speed": ("README.md", speed),
    "baselines": ("docs/baselines.md", baselines),
    "ops": ("docs/kernels.md", ops),
    "training": ("docs/train.md", training),
    "ways": (PERFORMANCE, ways),
    "sweeps": (PERFORMANCE, sweeps),
    "prefix-fit": (PERFORMANCE, prefix_fit),
    "mixed": (PERFORMANCE, mixed),
    "profile": (PERFORMANCE, profile),
    "adaptive": (PERFORMANCE, adaptive),
}
"""By the name of a block: its page, and what makes it."""
