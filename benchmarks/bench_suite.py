"""All benchmarks, one after the other, and their tables and plots.

    python benchmarks/bench_suite.py [--only engine ways ...] [-- OPTIONS OF bench_engine.py]

Records go to ``benchmarks/results/NAME-DEVICE.json``, plots beside them, and the tables of README
and docs are made from them again. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
WHERE_THEY_ARE = ("ops", "train")
"""Benchmarks that take the GPU where there is one."""
ORDER = ("ops", "engine", "ways", "sweeps", "serving", "soak", "train")


def main() -> None:
    """Run them; one that fails does not keep the others from running."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    own, more = _split(sys.argv[1:])
    asked = parser.parse_args(own)
    label = "cpu" if asked.device == "cpu" else _label(torch.cuda.get_device_name(asked.device))
    failed = []
    for name in asked.only:
        command = [sys.executable, str(HERE / f"bench_{name}.py"), "--save", f"{name}-{label}"]
        command += ["--device", asked.device] if name not in WHERE_THEY_ARE else []
        command += more if name == "engine" else []
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    refresh = HERE.parent / "docs/refresh_readme.py"
    subprocess.run([sys.executable, str(refresh), "--tables"], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """What is before ``--``, and what is after it."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _label(device: str) -> str:
    """``NVIDIA H200`` as ``h200``."""
    return device.lower().split()[-1]


if __name__ == "__main__":
    main()
