"""Ten thousand requests of random shapes through one engine with a short cache.

    python benchmarks/bench_soak.py [--requests 10000] [--save NAME]

The packaged model with its packaged guides; one request in twenty is cancelled at a random moment.
Every request must end exactly once, all slots must come back, and memory must stay flat.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import record
from crowds import Shape, crowd
from rich.console import Console

from fastguide import Engine

SLOTS = 1200
"""Of each cache: some ten requests' worth."""
GUIDES: tuple[dict[str, float] | None, ...] = (
    None,
    {"cheerful": 1.0},
    {"brief": 1.0},
    {"cheerful": 1.0, "brief": 0.5},
)


def resident() -> float:
    """MB that this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main() -> None:
    """Run the crowd and, with --save, keep what was found."""
    parser = record.parser(__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    probe = Engine(device=asked.device, dtype="float32")
    each = sum(probe.loop.caches.slot_bytes().values())
    engine = Engine(device=asked.device, dtype="float32", kv_memory=SLOTS * each)
    del probe
    shape = Shape(vocabulary=2048, shared=60, own=60, new=48, weights=GUIDES)
    memory: list[dict[str, float]] = []
    marks = iter(range(0, asked.requests + 1, max(1, asked.requests // 10)))
    mark = next(marks)
    start = time.perf_counter()

    def note(ended: int) -> None:
        nonlocal mark
        while mark is not None and ended >= mark:
            minutes = (time.perf_counter() - start) / 60
            memory.append({"ended": ended, "MB": round(resident(), 1)})
            print(f"{ended:,} ended after {minutes:.1f} min, {memory[-1]['MB']} MB", flush=True)
            mark = next(marks, asked.requests + 1)

    outcome = crowd(engine, asked.requests, asked.seed, shape, note)
    seconds = time.perf_counter() - start
    stats = engine.stats
    later = [m["MB"] for m in memory[1:]]  # the first tenth warms up
    whole: dict[str, Any] = {
        "benchmark": "soak",
        "environment": record.environment(asked.device),
        "requests": outcome.requests,
        "cancelled": outcome.cancelled,
        "reasons": dict(outcome.reasons),
        "errors": outcome.errors[:5],
        "steps": outcome.steps,
        "tokens": stats.tokens,
        "preemptions": stats.preemptions,
        "slots": {name: cache.capacity for name, cache in stats.caches.items()},
        "in_use_at_the_end": {name: cache.in_use for name, cache in stats.caches.items()},
        "seconds": round(seconds, 1),
        "memory": memory,
        "memory_growth": round(later[-1] / later[0] - 1, 4),
    }
    Console().print(whole)
    if asked.save:
        print(f"record: {record.save(asked.save, whole)}")


if __name__ == "__main__":
    main()
