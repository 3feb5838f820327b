"""Tokens per second, guided and unguided, and where a step's time goes.

    python benchmarks/bench_engine.py [--batch 1 8] [--prompt 256] [--k 20] [--save NAME]
        [--published-python PYTHON --args-repo FOLDER --vas-repo FOLDER] [--gpt-fast-repo FOLDER]
    python benchmarks/bench_engine.py --profile [--batch 16]

The model is a Llama of 110 M parameters with random weights (12 layers, width 768, vocabulary
32,000, bf16), the guide another of the same shape. Guided and unguided steps alternate in one
run, so that a noisy machine disturbs both alike; ``transformers.generate`` is timed beside them.
At batch 1 so are plain transformers code for the same methods and, where clones of it are given,
the code that was published with them (``docs/baselines.md``).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import baselines
import record
import torch
from engines import write_models
from others import time_transformers
from phases import profile, show_profile
from published import Source
from rich.console import Console
from rich.table import Table
from shapes import (
    GUIDE_SEED,
    POLICY_SEED,
    SHAPE,
    build,
    open_rows,
    prompt_tokens,
    random_llama,
)

from fastguide import VAS, Plain
from fastguide.engine.runner import ModelRunner

BETA = baselines.CASES["VAS k=20"].strength
"""High, as the distribution of random weights is flat: candidates have nearly all of the mass."""


@torch.inference_mode()
def check(device: str, prompt: int = 32, steps: int = 4) -> None:
    """Greedy tokens, plain and guided, must be those of a full recompute in fp32."""
    runner = build(device, torch.float32)
    policy, guide = (
        random_llama(device, "sdpa", torch.float32, seed=seed) for seed in (POLICY_SEED, GUIDE_SEED)
    )
    head = runner.scorers["value"].head  # type: ignore[attr-defined]
    for rule in (Plain(), VAS(beta=20.0, k=5)):
        rows = open_rows(runner, rule, [prompt_tokens(0, prompt)], temperature=0.0)
        found = [runner.step(rows)[0].tokens[0] for _ in range(steps)]
        tokens = prompt_tokens(0, prompt)
        for _ in range(steps):
            logits = policy(torch.tensor([tokens], device=device)).logits[0, -1]
            values, ids = logits.topk(rule.k)
            if rule.guided:
                texts = torch.tensor([[*tokens, t] for t in ids.tolist()], device=device)
                hidden = guide.model(texts).last_hidden_state[:, -1]
                values = values + rule.beta * head(hidden)[:, 0]
            tokens.append(int(ids[values.argmax()]))
        expected = tokens[prompt:]
        if found != expected:
            raise SystemExit(f"{rule}: tokens {found}, but a full recompute gives {expected}")


def measure(runner: ModelRunner, arguments: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Alternate unguided and guided steps; medians, spreads and phases of both."""
    rules = {"unguided": Plain(), "guided": VAS(beta=BETA, k=arguments.k)}
    prompts = [prompt_tokens(b, arguments.prompt) for b in range(batch)]
    rows = {name: open_rows(runner, rule, prompts, 0.7) for name, rule in rules.items()}
    times: dict[str, list[float]] = {name: [] for name in rules}
    phases = {name: dict.fromkeys(runner.seconds, 0.0) for name in rules}
    for i in range(arguments.steps + 4):
        for name in rules:
            before = dict(runner.seconds)
            start = time.perf_counter()
            runner.step(rows[name])
            if i >= 4:  # the first steps warm up
                times[name].append(time.perf_counter() - start)
                for phase, seconds in runner.seconds.items():
                    phases[name][phase] += seconds - before[phase]
    pool = runner.scorers["value"].decoder.pool  # type: ignore[attr-defined]
    result: dict[str, Any] = {"batch": batch}
    for name in rules:
        total = sum(times[name])
        result[name] = record.spread(times[name]) | {
            "tokens_per_s": round(batch / statistics.median(times[name]), 1),
            "share": {p: round(s / total, 3) for p, s in phases[name].items()},
        }
        if arguments.device != "cpu":  # the host runs ahead of the device: its clock is no guide
            result[name]["share"] = {}
        for row in rows[name]:
            row.close()
    # Each guided step is compared with the unguided one beside it.
    ratios = [g / u for g, u in zip(times["guided"], times["unguided"], strict=True)]
    result["guided_over_unguided"] = round(statistics.median(ratios), 2)
    result["guide_pool_slots"] = pool.slots.capacity
    per_token = time_transformers(arguments.device, batch, arguments.prompt, arguments.steps)
    result["transformers_unguided_ms"] = round(1e3 * per_token, 3)
    return result


def show(results: list[dict[str, Any]]) -> None:
    """Print one line per batch and mode."""
    table = Table("batch", "mode", "ms/step (p20-p80)", "tokens/s", "base", "scorer", "rule")
    for result in results:
        for mode in ("unguided", "guided"):
            r = result[mode]
            times = f"{r['ms']:.1f} ({r['p20_ms']:.1f}-{r['p80_ms']:.1f})"
            phases = ("base", "scorer", "rule")
            shares = [f"{r['share'][p]:.0%}" if r["share"] else "" for p in phases]
            table.add_row(str(result["batch"]), mode, times, f"{r['tokens_per_s']:.1f}", *shares)
        other = result["transformers_unguided_ms"]
        rate = f"{1e3 * result['batch'] / other:.1f}"
        table.add_row(str(result["batch"]), "transformers", f"{other:.1f}", rate, "", "", "")
    console = Console()
    console.print(table)
    for result in results:
        ratio = result["guided_over_unguided"]
        console.print(f"batch {result['batch']}: a guided step takes {ratio:.2f} unguided steps")


def show_baselines(found: dict[str, Any]) -> None:
    """Print one line per method and who decodes it."""
    table = Table("batch 1", "ms/token (p20-p80)", "tokens/s", "/ fastguide")
    table.columns[0].no_wrap = True
    for name, r in found["rows"].items():
        times = f"{r['ms']:.1f} ({r['p20_ms']:.1f}-{r['p80_ms']:.1f})"
        table.add_row(name, times, f"{r['tokens_per_s']:.1f}", f"{r['over_fastguide']:.2f}")
    console = Console()
    console.print(table)
    for reason in found["missing"].values():
        console.print(f"not timed: {reason}", highlight=False)


def profile_steps(arguments: argparse.Namespace) -> None:
    """Print where the time of a step goes, at each batch size."""
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for batch in arguments.batch:
            print(f"batch {batch}")
            sizes = {"batch": batch, "prompt": arguments.prompt, "new_tokens": arguments.steps}
            show_profile(profile(Path(folder), arguments.device, **sizes))


def main() -> None:
    """Run the benchmark and, with --save, keep its record."""
    arguments = read_arguments()
    source = None
    if arguments.published_python:
        source = Source(arguments.published_python, arguments.args_repo, arguments.vas_repo)
    plan = baselines.Plan(
        arguments.device,
        arguments.prompt,
        arguments.new_tokens,
        arguments.rounds,
        source,
        arguments.gpt_fast_repo,
    )
    if arguments.profile:
        profile_steps(arguments)
        return
    check(arguments.device)
    if arguments.baselines:
        baselines.check(arguments.device, source)
    runner = build(arguments.device)
    results = [measure(runner, arguments, batch) for batch in arguments.batch]
    show(results)
    whole = {
        "benchmark": "engine",
        "environment": record.environment(arguments.device),
        "rooflines": record.rooflines(torch.bfloat16, arguments.device),
        "shape": SHAPE | {"dtype": "bfloat16", "prompt": arguments.prompt, "k": arguments.k},
        "results": results,
    }
    if arguments.baselines:
        whole["baselines"] = baselines.measure(plan, runner)
        show_baselines(whole["baselines"])
    if arguments.save:
        print(f"record: {record.save(arguments.save, whole)}")


def read_arguments() -> argparse.Namespace:
    """The command line, with what belongs together."""
    parser = record.parser(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--profile", action="store_true", help="only say where a step's time goes")
    group = parser.add_argument_group("baselines, at batch 1")
    group.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--new-tokens", type=int, default=64, help="of each response")
    group.add_argument("--rounds", type=int, default=3, help="responses of each row")
    group.add_argument("--published-python", metavar="PYTHON", help="one with transformers 4.36")
    group.add_argument("--args-repo", metavar="FOLDER", help="a clone of the published ARGS")
    group.add_argument("--vas-repo", metavar="FOLDER", help="a clone of the published VAS")
    group.add_argument("--gpt-fast-repo", metavar="FOLDER", help="a clone of gpt-fast")
    arguments = parser.parse_args()
    repositories = arguments.args_repo or arguments.vas_repo
    if bool(repositories) != bool(arguments.published_python):
        parser.error("--published-python needs --args-repo or --vas-repo, and they need it")
    return arguments


if __name__ == "__main__":
    main()
