"""Put the demo's real output and the measured tables into README.md and the pages of docs/.

    python docs/refresh_readme.py            # everything
    python docs/refresh_readme.py --tables   # only what comes from committed records

A block of a page between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced as a whole.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speed_tables import SPEED_TABLES

from fastguide.evaluate import difference_table
from fastguide.evaluate.report import at_equal_kl, table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
QUALITY = ROOT / "docs/results/stories.json"
EXPERIMENTS = ROOT / "docs/results"


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


def experiment(name: str) -> dict[str, Any]:
    """The record of an experiment."""
    file = EXPERIMENTS / name / "results.json"
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def points(name: str) -> str:
    """Everything measured."""
    return table(experiment(name)["points"])


def equal_kl(name: str, kls: tuple[float, ...], y: str = "reward") -> str:
    """Methods side by side."""
    return at_equal_kl(experiment(name)["points"], kls, y=y)


def equal_reward(numbers: Sequence[int] | None = None) -> str:
    """For each N, the weakest VAS that has at least the reward of best-of-N, and what both cost.

    ``numbers`` are the N to show; None shows all.
    """
    record = experiment("frontier")
    found = [r for r in record["points"] if r["method"] == "VAS"]
    lines = [
        "| best of | reward | KL | GFLOP | s | VAS | reward | KL | GFLOP | needed | s |",
        "| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    others = [r for r in record["points"] if r["method"] == "best-of-N"]
    for other in (r for r in others if numbers is None or r["setting"]["n"] in numbers):
        best = [r for r in found if r["reward"]["mean"] >= other["reward"]["mean"]]
        cells = ["none", "", "", "", "", ""]
        if best:
            ours = min(best, key=lambda r: r["kl"]["mean"])
            share = record["candidates"][ours["point"]] / record["k"]
            needed = (ours["policy_flops"] + share * ours["guide_flops"]) / 1e9
            cells = [f"β = {ours['setting']['beta']:g}", *_costs(ours)]
            cells.insert(4, f"{needed:.3g}")
        lines.append(f"| {other['setting']['n']} | {' | '.join([*_costs(other), *cells])} |")
    return "\n".join(lines)


def _costs(result: dict[str, Any]) -> list[str]:
    work = (result["policy_flops"] + result["guide_flops"]) / 1e9
    reward = f"{result['reward']['mean']:+.3f} ± {result['reward']['ci95']:.3f}"
    seconds = f"{result['seconds_per_response']:.3g}"
    return [reward, f"{result['kl']['mean']:.2f}", f"{work:.3g}", seconds]


def errors(name: str) -> str:
    """Monte-Carlo errors of guides."""
    record = experiment(name)["errors"]
    more = any("more" in e for e in record.values())
    lines = [
        f"| guide | MSE | seeds | explained variance |{' MSE above the first |' * more}",
        f"| --- | ---: | --- | ---: |{' ---: |' * more}",
    ]
    for guide, e in record.items():
        seeds = ", ".join(f"{x:.3f}" for x in e["seeds"])
        mse, explained = e["mse"], e["explained_variance"]
        lines.append(
            f"| {guide} | {mse['mean']:.3f} ({mse['low']:.3f} to {mse['high']:.3f}) | {seeds} "
            f"| {explained['mean']:.0%} ({explained['low']:.0%} to {explained['high']:.0%}) |"
        )
        if more:
            lines[-1] += f" {_mean(e['more'], '+.3f') if 'more' in e else ''} |"
    noise = next(iter(record.values()))["noise"]
    prefixes = next(iter(record.values()))["prefixes"]
    lines += ["", f"{prefixes} prefixes; the labels' own noise is {noise:.3f} of each error."]
    return "\n".join(lines)


def apart(name: str) -> str:
    """Rewards of methods two by two at equal KL, paired by prompt."""
    return difference_table(experiment(name)["differences"]).rstrip()


def rates() -> str:
    """Held-out errors of guides by learning rate, as far as rates were tried."""
    tried = experiment("guides")["tried"]
    every = sorted({float(rate) for found in tried.values() for rate in found})
    lines = [
        "| what is trained | " + " | ".join(f"{rate:g}" for rate in every) + " |",
        "| --- |" + " ---: |" * len(every),
    ]
    for kind, found in tried.items():
        errors = {float(rate): error for rate, error in found.items()}
        best = min(errors.values())
        cells = [f"{errors[r]:.3f}" if r in errors else "" for r in every]
        cells = [
            f"**{c}**" if errors.get(r) == best else c for r, c in zip(every, cells, strict=True)
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracies() -> str:
    """How often reward models prefer the chosen text of held-out pairs."""
    lines = ["| pairs | accuracy |", "| --- | ---: |"]
    for name, e in experiment("preferences")["accuracies"].items():
        lines.append(f"| {name} | {e['mean']:.1%} ± {e['ci95']:.1%} |")
    return "\n".join(lines)


def above() -> str:
    """What guides of preferences add to the policy's rewards."""
    lines = ["| point | reward above the policy's | judge above the policy's | seeds |"]
    lines.append("| --- | ---: | ---: | --- |")
    for e in experiment("preferences")["above"]:
        seeds = ", ".join(f"{gain:+.2f}" for gain in e["judge"]["seeds"])
        both = f"{_mean(e['reward'], '+.2f')} | {_mean(e['judge'], '+.2f')}"
        lines.append(f"| {e['point']} | {both} | {seeds} |")
    return "\n".join(lines)


def _mean(estimate: dict[str, float], form: str) -> str:
    value = round(estimate["mean"], 6) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{value:{form}} ± {estimate['ci95']:{form.lstrip('+')}}"


KLS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0)
TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "quality": (README, quality),
    "reward": (README, functools.partial(equal_reward, (16, 64, 128))),
    **{name: (ROOT / page, make) for name, (page, make) in SPEED_TABLES.items()},
}
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "frontier": {
        "equal-kl": functools.partial(equal_kl, "frontier", KLS),
        "equal-kl-vader": functools.partial(equal_kl, "frontier", KLS, "vader"),
        "equal-reward": equal_reward,
        "differences": functools.partial(apart, "frontier"),
    },
    "ablations": {
        "errors": functools.partial(errors, "ablations"),
        "equal-kl": functools.partial(equal_kl, "ablations", KLS),
        "differences": functools.partial(apart, "ablations"),
    },
    "guides": {
        "errors": functools.partial(errors, "guides"),
        "rates": rates,
        "equal-kl": functools.partial(equal_kl, "guides", (1.0, 2.0, 4.0, 6.0)),
        "differences": functools.partial(apart, "guides"),
    },
    "brevity": {},
    "composition": {},
    "preferences": {"accuracies": accuracies, "above": above},
}
"""What each experiment's page may show, beside all points."""

for _name, _blocks in BLOCKS.items():
    _page = EXPERIMENTS / _name / "README.md"
    _text = _page.read_text(encoding="utf-8") if _page.is_file() else ""
    for _block, _make in {"points": functools.partial(points, _name), **_blocks}.items():
        if f"<!-- {_name}-{_block} -->" in _text:
            TABLES[f"{_name}-{_block}"] = (_page, _make)


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
