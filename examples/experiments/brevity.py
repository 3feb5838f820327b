"""How long responses get as beta varies.

    python examples/experiments/brevity.py

The result is in ``docs/results/brevity/``.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

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
from fastguide.evaluate.report import sweep

MAX_TOKENS = 320
REWARD = "brevity"
BETAS = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0, 16.0)
TRAINING: dict[str, Any] = {
    "num_train_epochs": 3,
    "attention": "sdpa",
    "model": {"lora_rank": 16},
}


def main() -> None:
    """Run all stages; see ``--help``."""
    asked = options(__doc__ or "", prompts=3000)
    seeds = range(asked.seeds)
    folder = data(asked)
    with stage("responses"):
        responses(asked.data / "train.txt", folder, asked.prompts, MAX_TOKENS, {REWARD: REWARD})
    with stage("guides"):
        parallel(
            [
                functools.partial(
                    train, guide_folder(asked.work, REWARD, s), folder, REWARD, seed=s, **TRAINING
                )
                for s in seeds
            ],
            asked.processes,
        )
    with stage("measuring"):
        studies = {asked.work / f"brevity-{s}": study(asked, s) for s in seeds}
        results = measure(studies, asked.processes)
    target = asked.results / "brevity"
    write(target, results, asked)
    sweep(results, "beta", target / "length.png", y="tokens", title="Length of a response")


def data(asked: argparse.Namespace) -> Path:
    """The folder of the responses, longer than those that cheerfulness is judged on."""
    return Path(asked.work / f"data-{asked.prompts}-long")


def study(asked: argparse.Namespace, seed: int) -> Study:
    """The comparison of one seed."""
    draws = sampling(seed, MAX_TOKENS, n=2)
    points = [Point("VAS", {"beta": 0.0}, Plain(), {}, draws)]
    points += [Point("VAS", {"beta": beta}, VAS(beta=beta), {REWARD: 1.0}, draws) for beta in BETAS]
    return Study(
        held_out(asked),
        points,
        guides={REWARD: str(guide_folder(asked.work, REWARD, seed))},
        reward=REWARD,
        held_out={"cheerfulness": "cheerfulness"},
        max_rows=128,
    )


if __name__ == "__main__":
    main()
