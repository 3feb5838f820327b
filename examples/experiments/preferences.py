"""Reward models from pairs, through TRL, and what they do as guides of ARGS.

    python examples/experiments/preferences.py

Five traits (pairs of a statement of the trait and one of its opposite) and harmlessness (pairs of
dialogues). Guide and judge learn from different halves of the pairs. The policy is the story model
after fine-tuning on both sides of all pairs. The result is in ``docs/results/preferences/``.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import random
from pathlib import Path
from typing import Any

from common import BATCH, Job, hardware, measure, options, parallel, sampling, stage, write

from fastguide import ARGS
from fastguide.config import Plain
from fastguide.evaluate import Point, Study
from fastguide.evaluate.metrics import Estimate
from fastguide.evaluate.report import frontier

TRAITS = ("agreeableness", "conscientiousness", "extraversion", "neuroticism", "openness")
DIALOGUES = "harmlessness"
STEERED = ("agreeableness", DIALOGUES)
WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0)
MAX_LENGTH = {DIALOGUES: 256}
"""Tokens of a text in training; statements are shorter than the default."""
SHORT = 64
EPOCHS = {DIALOGUES: 2}
ATTENTION = {DIALOGUES: "sdpa"}
"""The fastest to train: eager attention takes several times as long at such lengths."""
ANSWER = "\n\nAssistant:"

Pair = dict[str, str]


def main() -> None:
    """Run all stages; see ``--help``."""
    asked = options(__doc__ or "", judged=48)
    seeds = range(asked.seeds)
    with stage("reward models and policies"):
        jobs: list[Job] = []
        for name in (DIALOGUES, *TRAITS):
            if name in STEERED:
                jobs.append(functools.partial(fine_tune, asked, name))
            for role in ("guide", "judge"):
                jobs += [functools.partial(reward_model, asked, name, role, s) for s in seeds]
        parallel(jobs, asked.processes)
    accuracies = {
        name: Estimate.of(
            {
                i: [read(folder(asked, name, role, seed))["eval_accuracy"]]
                for i, (role, seed) in enumerate(
                    (role, seed) for role in ("guide", "judge") for seed in seeds
                )
            }
        )
        for name in (*TRAITS, DIALOGUES)
    }
    results, above = [], []
    for name in STEERED:
        with stage(f"measuring {name}"):
            studies = {asked.work / f"preferences-{name}-{s}": study(asked, name, s) for s in seeds}
            results += measure(studies, asked.processes)
            above += above_policy(list(studies), name)
    target = asked.results / "preferences"
    found = {name: {"mean": e.mean, "ci95": e.ci95} for name, e in accuracies.items()}
    write(target, results, asked, accuracies=found, above=above)
    for name in STEERED:
        points = [r for r in results if name in r["method"]]
        frontier(points, target / f"{name}.png", y="judge", title=f"ARGS: {name}, held-out judge")


# ----------------------------------------------------------------------------------- pairs


def pairs(asked: argparse.Namespace, name: str) -> list[Pair]:
    """All pairs of a data set, in a fixed order."""
    data = asked.data.parent
    if name == DIALOGUES:
        file = data / "pref_hh_rlhf/harmless-base-test.jsonl.gz"
        found = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    else:
        lines = (data / f"attr_anthropic_evals/{name}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in lines.splitlines()]
        yes, no = (
            [r["statement"] for r in rows if r["answer_matching_behavior"].strip() == answer]
            for answer in ("Yes", "No")
        )
        found = [{"chosen": a, "rejected": b} for a, b in zip(yes, no, strict=True)]
    random.Random(0).shuffle(found)
    return found


def halves(asked: argparse.Namespace, name: str) -> dict[str, list[Pair]]:
    """The pairs of guide and judge."""
    every = pairs(asked, name)
    return {"guide": every[::2], "judge": every[1::2]}


def prompts(asked: argparse.Namespace, name: str) -> list[str]:
    """Openings from the judge's half: the first words, or what an answer is asked to."""
    found = []
    for pair in halves(asked, name)["judge"]:
        if name == DIALOGUES:
            found.append(pair["chosen"].rpartition(ANSWER)[0] + ANSWER)
        else:
            found.append(" ".join(pair["chosen"].split()[:2]))
    short = [prompt for prompt in dict.fromkeys(found) if len(prompt) < 400]
    return short[: asked.judged]


# -------------------------------------------------------------------------------- training


def folder(asked: argparse.Namespace, name: str, role: str, seed: int = 0) -> Path:
    """Where a model lies."""
    return Path(asked.work / f"preferences/{name}-{role}-{seed}")


def settings(where: Path, name: str, seed: int) -> dict[str, Any]:
    """What all trainings share."""
    return {
        "output_dir": str(where),
        "num_train_epochs": EPOCHS.get(name, 4),
        "per_device_train_batch_size": BATCH // 2,
        "max_length": MAX_LENGTH.get(name, SHORT),
        "gradient_checkpointing": False,
        "learning_rate": 3e-4,
        **hardware(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 100,
        "seed": seed,
    }


def reward_model(asked: argparse.Namespace, name: str, role: str, seed: int) -> None:
    """Train a reward model on one half of the pairs, a fifth of it held out."""
    where = folder(asked, name, role, seed)
    if (where / "metrics.json").is_file():
        return
    import datasets
    from trl import RewardConfig

    from fastguide.train.preferences import train_reward

    rows = datasets.Dataset.from_list(halves(asked, name)[role])
    config = RewardConfig(**settings(where, name, seed))
    attention = ATTENTION.get(name, "eager")
    metrics = train_reward(rows, "stories", config, held_out=0.2, attn_implementation=attention)
    (where / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def fine_tune(asked: argparse.Namespace, name: str) -> None:
    """Fine-tune the story model on both sides of all pairs: it has no preference."""
    where = folder(asked, name, "policy")
    if (where / "metrics.json").is_file():
        return
    import datasets
    from trl import SFTConfig

    from fastguide.train.preferences import train_sft

    texts = [{"text": pair[side]} for pair in pairs(asked, name) for side in pair]
    config = SFTConfig(**settings(where, name, 0))
    metrics = train_sft(
        datasets.Dataset.from_list(texts),
        "stories",
        config,
        attn_implementation=ATTENTION.get(name, "eager"),
    )
    (where / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def read(where: Path) -> dict[str, float]:
    """The metrics of a model."""
    found: dict[str, float] = json.loads((where / "metrics.json").read_text(encoding="utf-8"))
    return found


# ------------------------------------------------------------------------------- measuring


def study(asked: argparse.Namespace, name: str, seed: int) -> Study:
    """The comparison of one seed."""
    draws = sampling(seed, 48 if name == DIALOGUES else 24)
    points = [Point(f"{name}, policy", {}, Plain(), {}, draws)]
    points += [
        Point(f"{name}, ARGS", {"weight": w}, ARGS(weight=w, k=10), {"guide": 1.0}, draws)
        for w in WEIGHTS
    ]
    guide, judge = (folder(asked, name, role, seed) for role in ("guide", "judge"))
    return Study(
        prompts(asked, name),
        points,
        policy=str(folder(asked, name, "policy")),
        guides={"guide": f"reward:{guide}"},
        reward=f"classifier:{guide}",
        held_out={"judge": f"classifier:{judge}"},
        max_rows=128,
    )


def above_policy(studies: list[Path], name: str) -> list[dict[str, Any]]:
    """What each weight adds to the policy's rewards, seed by seed: each has scales of its own."""
    runs = []
    for where in studies:
        points = json.loads((where / "results.json").read_text(encoding="utf-8"))["points"]
        runs.append({point["point"]: point for point in points})
    found = []
    for point in runs[0]:
        if point == f"{name}, policy":
            continue
        found.append({"point": point})
        for reward in ("reward", "judge"):
            gains = [
                run[point][reward]["mean"] - run[f"{name}, policy"][reward]["mean"] for run in runs
            ]
            estimate = Estimate.of({seed: [gain] for seed, gain in enumerate(gains)})
            found[-1][reward] = {"mean": estimate.mean, "ci95": estimate.ci95, "seeds": gains}
    return found


if __name__ == "__main__":
    main()
