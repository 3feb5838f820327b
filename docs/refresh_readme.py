"""Put the demo's real output and the measured tables into README.md and docs/kernels.md.

    python docs/refresh_readme.py            # everything
    python docs/refresh_readme.py --tables   # only what comes from committed records

A block of a page between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced as a whole.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
KERNELS = ROOT / "docs/kernels.md"
QUALITY = ROOT / "docs/results/stories.json"
SPEED = ROOT / "benchmarks/results"


def demo() -> str:
    """What ``make demo`` prints into a file, 96 columns wide: its environment is not active."""
    code = "from fastguide.cli import main; main()"
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join(p for p in os.get_exec_path() if p != scripts)
    result = subprocess.run(
        [sys.executable, "-c", code, "demo"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "96", "TERM": "dumb", "PATH": path},
    )
    lines = [line.rstrip() for line in result.stdout.strip("\n").splitlines()]
    return "\n".join(["```text", "$ make demo", *lines, "```"])


def quality() -> str:
    """The guides' effect over β and how it was measured, from ``docs/results/stories.json``."""
    record = json.loads(QUALITY.read_text(encoding="utf-8"))
    setting = record["setting"]
    limits = " and ".join(f"{most} tokens for {n}" for n, most in setting["max_tokens"].items())
    text = (
        f"{setting['prompts']} prompts, {setting['samples_per_prompt']} responses each, "
        f"temperature {setting['temperature']}, k = {setting['k']}, at most {limits}; "
        "± is a 95 % interval. The reward is counted in standard deviations σ from the mean of the "
        "unguided *training* responses, so on these prompts it is not 0 at β = 0 either."
    )
    lines = [
        textwrap.fill(text, 100, break_on_hyphens=False),
        "",
        "| guide | β | reward, σ | tokens | KL per response |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, points in record["points"].items():
        for beta, point in sorted(points.items(), key=lambda item: float(item[0])):
            reward, tokens, kl = (
                point[key] for key in ("reward_sd_units", "tokens", "kl_per_response")
            )
            lines.append(
                f"| {name} | {beta} | {_mean(reward, '+.2f')} | {_mean(tokens, '.0f')} "
                f"| {_mean(kl, '.1f')} |"
            )
    return "\n".join(lines)


def speed() -> str:
    """Guided against unguided steps, from the engine benchmark's records."""
    lines = [
        "| device | batch | unguided, ms | guided, ms | guided / unguided |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for path in sorted(SPEED.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("benchmark") != "engine":
            continue
        device = record["environment"]["device"]
        lines += [
            f"| {device} | {r['batch']} | {r['unguided']['ms']:.1f} | {r['guided']['ms']:.1f} "
            f"| {r['guided_over_unguided']:.2f} |"
            for r in record["results"]
        ]
    return "\n".join(lines)


def ops() -> str:
    """Every op beside its fastest rival, from the op benchmark's records."""
    lines = []
    for path in sorted(SPEED.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("benchmark") != "ops":
            continue
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


def _mean(estimate: dict[str, float], form: str) -> str:
    value = round(estimate["mean"], 6) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{value:{form}} ± {estimate['ci95']:{form.lstrip('+')}}"


TABLES = {"quality": (README, quality), "speed": (README, speed), "ops": (KERNELS, ops)}


def replaced(text: str, name: str, block: str) -> str:
    """The text with one block exchanged."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no block {name!r}")
    return pattern.sub(lambda found: found[1] + block + "\n" + found[2].lstrip("\n"), text)


def main() -> None:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="leave the demo's output as it is")
    blocks = TABLES if parser.parse_args().tables else {**TABLES, "demo": (README, demo)}
    for name, (page, make) in blocks.items():
        text = page.read_text(encoding="utf-8")
        page.write_text(replaced(text, name, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
