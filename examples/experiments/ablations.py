"""What VAS' design choices are worth: mean fill, TD(lambda), the number of candidates.

    python examples/experiments/ablations.py

The result is in ``docs/results/ablations/``.
"""

from __future__ import annotations

import argparse
import functools

from common import (
    compared,
    held_out,
    measure,
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

from fastguide import VAS
from fastguide.config import Plain
from fastguide.evaluate import Point, Study
from fastguide.evaluate.report import frontier, sweep

BETAS = (1.0, 2.0, 4.0, 8.0, 16.0)
CANDIDATES = (5, 10, 20, 50, 100, 200)
BETA = 5.0
"""Of the sweep over k, as in the paper."""
CANDIDATES_AT = f"VAS, β = {BETA:g}"
LAMBDAS = {"vas": 0.95, "td0": 0.0}


def main() -> None:
    """Run all stages; see ``--help``."""
    asked = options(__doc__ or "", halves=128)
    seeds = range(asked.seeds)
    data, halves = asked.work / f"data-{asked.prompts}", asked.work / f"halves-{asked.halves}"
    with stage("responses"):
        responses(asked.data / "train.txt", data, asked.prompts, MAX_TOKENS, {REWARD: REWARD})
        monte_carlo(other_held_out(asked), halves, MAX_TOKENS, REWARD)
    with stage("guides"):
        jobs = [
            functools.partial(
                train, guide_folder(asked.work, name, seed), data, REWARD, seed=seed, lam=lam
            )
            for seed in seeds
            for name, lam in LAMBDAS.items()
        ]
        parallel(jobs, asked.processes)
        folders = {
            f"TD({lam:g})": [guide_folder(asked.work, name, s) for s in seeds]
            for name, lam in LAMBDAS.items()
        }
        errors = compared(folders, halves)
    with stage("measuring"):
        studies = {asked.work / f"ablations-{s}": study(asked, s) for s in seeds}
        results = measure(studies, asked.processes)
    folder = asked.results / "ablations"
    apart = paired(studies, [("VAS", "no fill"), ("VAS", "TD(0)")])
    write(folder, results, asked, errors=errors, differences=apart)
    by_k = [r for r in results if r["method"] == CANDIDATES_AT]
    by_beta = [r for r in results if "beta" in r["setting"]]
    frontier(by_beta, folder / "frontier.png", title="Mean fill, no fill, TD(0)")
    sweep(by_k, "k", folder / "k.png", title=f"Candidates, {CANDIDATES_AT}")


def study(asked: argparse.Namespace, seed: int) -> Study:
    """The comparison of one seed."""
    draws = sampling(seed, MAX_TOKENS, n=2)
    points = [Point("policy", {}, Plain(), {}, draws)]
    for beta in BETAS:
        vas, bare = VAS(beta=beta), VAS(beta=beta, fill="none")
        points.append(Point("VAS", {"beta": beta}, vas, {"vas": 1.0}, draws))
        points.append(Point("no fill", {"beta": beta}, bare, {"vas": 1.0}, draws))
        points.append(Point("TD(0)", {"beta": beta}, vas, {"td0": 1.0}, draws))
    for k in CANDIDATES:
        points.append(Point(CANDIDATES_AT, {"k": k}, VAS(beta=BETA, k=k), {"vas": 1.0}, draws))
    return Study(
        held_out(asked),
        points,
        guides={name: str(guide_folder(asked.work, name, seed)) for name in LAMBDAS},
        reward=REWARD,
        max_rows=128,
    )


if __name__ == "__main__":
    main()
