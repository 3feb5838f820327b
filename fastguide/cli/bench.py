"""``fastguide bench``: the benchmarks of the source tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def bench(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(
            help="ops: each kernel; engine: decode steps beside those of others; ways: by the "
            "way that guides run; sweeps: over requests, candidates, prefixes and guides; serving: "
            "many requests; train: training steps; suite: all of them."
        ),
    ] = None,
) -> None:
    """Time fastguide beside what anyone would use instead.

    The benchmarks are in the source tree, not in the package.

    Options after the name are the benchmark's own: fastguide bench ops --help
    """
    if what in (None, "-h", "--help"):
        typer.echo(context.get_help())
        raise typer.Exit
    names = sorted(path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py"))
    if not names:
        raise ValueError(
            f"no benchmarks at {BENCHMARKS}; they are part of the source tree: clone it and "
            "install it with 'pip install -e .[bench]'"
        )
    if what not in names:
        raise ValueError(f"benchmark is {what!r}; allowed are {', '.join(names)}")
    script = BENCHMARKS / f"bench_{what}.py"
    code = subprocess.run([sys.executable, str(script), *context.args], check=False).returncode
    raise typer.Exit(code)
