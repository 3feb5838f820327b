"""What every benchmark records beside its figures: commit, device, versions, rooflines, spread."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that runs on one device and may save a record."""
    options = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    return options


def spread(seconds: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    ordered = sorted(seconds)
    return {
        "ms": round(1e3 * statistics.median(ordered), digits),
        "p20_ms": round(1e3 * ordered[len(ordered) // 5], digits),
        "p80_ms": round(1e3 * ordered[(4 * len(ordered)) // 5], digits),
    }


def environment(device: str) -> dict[str, Any]:
    """Commit, device and versions."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    return {
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": _cpu_name() if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]} ({os.cpu_count()} cores)"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def rooflines(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Read and copy bandwidth and matmul rate of this device, measured now.

    Reading is a matrix-vector product over 256 MB, the access pattern of a decode step, or a sum
    of as many bytes; a copy counts what it reads and writes; the matmul is square. On a CPU, which
    may lack instructions for ``dtype``, fp32 is tried as well, and the faster counts.
    """
    size = 4096 if device == "cpu" else 16384
    big = torch.randn(32768, size, device=device, dtype=torch.float32).to(dtype)
    vector = torch.randn(1, size, device=device, dtype=torch.float32).to(dtype)
    words = big.view(torch.float32)
    read = min(
        best(lambda: torch.nn.functional.linear(vector, big), 7, device),
        best(lambda: words.sum(), 7, device),
    )
    target = torch.empty_like(big)
    copy = best(lambda: target.copy_(big), 7, device)
    square = big[:2048, :2048].contiguous() if device == "cpu" else big[:size, :size]
    rows = square.shape[0]
    matmul = best(lambda: square @ square, 7, device)
    if device == "cpu":
        wide = square.float()
        matmul = min(matmul, best(lambda: wide @ wide, 7, device))
    return {
        "read_GB_per_s": round(big.nbytes / read / 1e9, 1),
        "copy_GB_per_s": round(2 * big.nbytes / copy / 1e9, 1),
        "matmul_GFLOP_per_s": round(2 * rows**3 / matmul / 1e9, 1),
    }


def best(run: Callable[[], object], times: int, device: str) -> float:
    """The shortest of several runs, in seconds, after one to warm up."""
    run()
    found = float("inf")
    for _ in range(times):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        found = min(found, time.perf_counter() - start)
    return found


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def save(name: str, record: dict[str, Any]) -> Path:
    """Write a record to ``benchmarks/results/NAME.json``, or to a path that ends in .json."""
    RESULTS.mkdir(exist_ok=True)
    path = Path(name) if name.endswith(".json") else RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
