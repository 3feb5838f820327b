"""What makes a good guide: how many responses it learns from, and which weights are trained.

    python examples/experiments/guides.py

The result is in ``docs/results/guides/``.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from common import (
    Job,
    compared,
    held_out,
    measure,
    metrics_of,
    monte_carlo,
    options,
    other_held_out,
    paired,
    parallel,
    responses,
    sampling,
    stage,
    train,
    write,
)
from frontier import MAX_TOKENS, REWARD, guide_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastguide import VAS
from fastguide.assets import resolve
from fastguide.config import Plain
from fastguide.evaluate import Point, Study
from fastguide.evaluate.report import frontier

BETAS = (2.0, 4.0, 8.0)
KLS = (1.0, 2.0, 4.0, 6.0)
SHARES = (8, 3)
"""Of the prompts: an eighth and a third."""
RATES: dict[str, tuple[float, ...]] = {
    "LoRA": (3e-4, 1e-3, 3e-3, 1e-2),
    "half the layers": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "frozen, linear": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "frozen, mlp": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
"""Tried by ``--tune``, on all responses: what is best for few steps may be too high for many."""
TUNED = {"LoRA": 3e-3, "half the layers": 3e-4, "frozen, linear": 1e-2, "frozen, mlp": 1e-2}
"""What it found."""
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_rank": 16},
    "half the layers": {"lora_rank": None},
    "frozen, linear": {"freeze": True, "head": "linear"},
    "frozen, mlp": {"freeze": True, "head": "mlp"},
}
"""What is trained in place of all weights of a backbone like the policy."""


def main() -> None:
    """Run all stages; see ``--help``."""
    flags = {"tune": "try learning rates again, which is 17 trainings more"}
    asked = options(__doc__ or "", flags, prompts=2000, halves=128)
    seeds = range(asked.seeds)
    halves = asked.work / f"halves-{asked.halves}"
    sizes = {
        f"{2 * asked.prompts // share:,} responses": asked.prompts // share for share in SHARES
    }
    whole = f"{2 * asked.prompts:,} responses, all weights"
    with stage("responses"):
        file = asked.data / "train.txt"
        parallel(
            [
                functools.partial(responses, file, data(asked, n), n, MAX_TOKENS, {REWARD: REWARD})
                for n in (asked.prompts, *sizes.values())
            ],
            asked.processes,
        )
        monte_carlo(other_held_out(asked), halves, MAX_TOKENS, REWARD)
        make_small(small(asked))
    rates, tried = TUNED, {}
    if asked.tune:
        with stage("learning rates"):
            tried = try_rates(asked)
            rates = {kind: min(found, key=found.__getitem__) for kind, found in tried.items()}
    with stage("guides"):
        jobs: list[Job] = []
        for seed in seeds:
            jobs.append(job(asked, whole, seed, asked.prompts))
            jobs += [
                job(
                    asked,
                    name,
                    seed,
                    n,
                    num_train_epochs=round(2 * asked.prompts / n),
                    patience=2,
                )
                for name, n in sizes.items()
            ]
            for kind, rate in rates.items():
                name = at_rate(kind, rate)
                jobs.append(job(asked, name, seed, asked.prompts, **how(kind, rate)))
        parallel(jobs, asked.processes)
        names = {name: slug(name) for name in (whole, *sizes)}
        names |= {kind: slug(at_rate(kind, rates[kind])) for kind in KINDS}
        folders = {
            name: [guide_folder(asked.work, folder, s) for s in seeds]
            for name, folder in names.items()
        }
        errors = compared(folders, halves)
    with stage("measuring"):
        studies = {asked.work / f"guides-{s}": study(asked, names, s) for s in seeds}
        results = measure(studies, asked.processes)
    folder = asked.results / "guides"
    apart = paired(studies, [(whole, other) for other in names if other != whole], KLS)
    found = {"errors": errors, "learning_rates": rates, "tried": tried, "differences": apart}
    write(folder, results, asked, **found)
    for file, others, title in (
        ("responses.png", sizes, "Responses trained on"),
        ("weights.png", KINDS, "What is trained"),
    ):
        shown = [r for r in results if r["method"] in ("policy", whole, *others)]
        frontier(shown, folder / file, title=title)


def data(asked: argparse.Namespace, prompts: int) -> Path:
    """The folder of responses to so many prompts."""
    return Path(asked.work / f"data-{prompts}")


def slug(name: str) -> str:
    """A name of a folder."""
    return "-".join(name.replace(",", "").split())


def small(asked: argparse.Namespace) -> Path:
    """The folder of the smaller backbone."""
    return Path(asked.work / "half")


def make_small(folder: Path) -> None:
    """A smaller backbone: the lower half of the policy's layers."""
    policy = resolve("stories")
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.model.layers = model.model.layers[: model.config.num_hidden_layers // 2]
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)


def job(asked: argparse.Namespace, name: str, seed: int, prompts: int, **how: Any) -> Job:
    """The training of one guide."""
    folder = guide_folder(asked.work, slug(name), seed)
    base = str(small(asked)) if name.startswith("half the layers") else "stories"
    return functools.partial(
        train, folder, data(asked, prompts), REWARD, seed=seed, base=base, **how
    )


def at_rate(kind: str, rate: float) -> str:
    """A name of the guides that were trained at one rate."""
    return f"{kind} {rate:g}"


def how(kind: str, rate: float) -> dict[str, Any]:
    """What ``job`` is told of a kind."""
    return {"learning_rate": rate, "model": KINDS[kind]}


def try_rates(asked: argparse.Namespace) -> dict[str, dict[float, float]]:
    """Held-out errors of the first seed's guides, by kind and learning rate."""
    tried = [(kind, rate) for kind in KINDS for rate in RATES[kind]]
    parallel(
        [job(asked, at_rate(kind, r), 0, asked.prompts, **how(kind, r)) for kind, r in tried],
        asked.processes,
    )

    def error(kind: str, rate: float) -> float:
        folder = guide_folder(asked.work, slug(at_rate(kind, rate)), 0)
        return float(metrics_of(folder)["eval_mse"])

    return {kind: {rate: error(kind, rate) for rate in RATES[kind]} for kind in KINDS}


def study(asked: argparse.Namespace, names: dict[str, str], seed: int) -> Study:
    """The comparison of one seed; ``names`` has the guides' folders."""
    draws = sampling(seed, MAX_TOKENS, n=2)
    points = [Point("policy", {}, Plain(), {}, draws)]
    for name, guide in names.items():
        for beta in BETAS:
            points.append(Point(name, {"beta": beta}, VAS(beta=beta), {guide: 1.0}, draws))
    return Study(
        held_out(asked),
        points,
        guides={g: str(guide_folder(asked.work, g, seed)) for g in names.values()},
        reward=REWARD,
        max_rows=128,
    )


if __name__ == "__main__":
    main()
