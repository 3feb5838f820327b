"""Three objectives composed while decoding, against each of them alone.

    python examples/experiments/composition.py

Cheerful, brief, and full of dialogue: guides of the same policy that know nothing of each other.
The result is in ``docs/results/composition/``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brevity import MAX_TOKENS, TRAINING, data
from common import (
    held_out,
    measure,
    options,
    parallel,
    responses,
    sampling,
    stage,
    train,
    write,
)
from frontier import guide_folder

from fastguide import VAS
from fastguide.config import Plain
from fastguide.evaluate import Point, Study
from fastguide.train.labels import load_episodes

REWARDS = {"cheerfulness": "cheerfulness", "brevity": "brevity", "dialogue": "dialogue:share"}
GUIDES = {"cheerful": "cheerfulness", "brief": "brevity", "dialogue": "dialogue"}
"""The reward that each guide learns."""
EPOCHS = 2
"""Of the guides that are not brevity's, which are done sooner."""
BETAS = (4.0, 8.0)
K = 10
"""Candidates: within the interval of 20, by ``ablations.py``, for half the work."""


def main() -> None:
    """Run all stages; see ``--help``."""
    asked = options(__doc__ or "", prompts=3000)
    seeds = range(asked.seeds)
    folder = data(asked)
    with stage("responses"):
        responses(asked.data / "train.txt", folder, asked.prompts, MAX_TOKENS, REWARDS)
    with stage("guides"):
        parallel(
            [
                functools.partial(
                    train, guide(asked, reward, seed), folder, reward, seed=seed, **settings(reward)
                )
                for seed in seeds
                for reward in REWARDS
            ],
            asked.processes,
        )
    with stage("measuring"):
        studies = {asked.work / f"composition-{s}": study(asked, s) for s in seeds}
        results = measure(studies, asked.processes)
    target = asked.results / "composition"
    scales = {name: load_episodes(folder, reward)[1].std for name, reward in GUIDES.items()}
    write(target, results, asked, deviations=scales)
    draw(results, scales, target / "gains.png")


def guide(asked: argparse.Namespace, reward: str, seed: int) -> Path:
    """The folder of a guide; brevity's is that of its own experiment."""
    name = reward if reward == "brevity" else f"long-{reward}"
    return guide_folder(asked.work, name, seed)


def settings(reward: str) -> dict[str, Any]:
    """How a guide is trained."""
    return TRAINING if reward == "brevity" else {**TRAINING, "num_train_epochs": EPOCHS}


def study(asked: argparse.Namespace, seed: int) -> Study:
    """The comparison of one seed."""
    draws = sampling(seed, MAX_TOKENS, n=2)
    points = [Point("policy", {}, Plain(), {}, draws)]
    for size in (1, 2, 3):
        for names in itertools.combinations(GUIDES, size):
            weights = dict.fromkeys(names, 1.0)
            for beta in BETAS:
                rule = VAS(beta=beta, k=K)
                points.append(Point(" + ".join(names), {"beta": beta}, rule, weights, draws))
    cheerful, *others = ((name, REWARDS[reward]) for name, reward in GUIDES.items())
    return Study(
        held_out(asked),
        points,
        guides={name: str(guide(asked, reward, seed)) for name, reward in GUIDES.items()},
        reward=cheerful[1],
        held_out=dict(others),
        max_rows=128,
    )


def draw(results: Sequence[dict[str, Any]], scales: dict[str, float], file: Path) -> None:
    """Each objective's gain over the policy, in standard deviations, at the first beta."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = dict(zip(GUIDES, ("reward", "brief", "dialogue"), strict=True))
    policy, *others = results
    shown = [r for r in others if r["setting"]["beta"] == BETAS[0]]
    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, column) in enumerate(columns.items()):
        gains = [(r[column]["mean"] - policy[column]["mean"]) / scales[name] for r in shown]
        halves = [r[column]["ci95"] / scales[name] for r in shown]
        where = [j + 0.27 * (i - 1) for j in range(len(shown))]
        axes.bar(where, gains, 0.25, yerr=halves, capsize=2, label=name)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shown)), [r["method"].replace(" + ", "\n+ ") for r in shown])
    axes.set_xlabel("guides")
    axes.set_ylabel("gain over the policy, standard deviations")
    axes.set_title(f"Alone and composed, β = {BETAS[0]:g}")
    axes.legend(title="objective")
    figure.savefig(file, metadata={"Software": None})


if __name__ == "__main__":
    main()
