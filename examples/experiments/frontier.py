"""What cheerfulness costs: KL-reward frontiers of VAS, FUDGE, Online FUDGE, ARGS and best-of-N.

    python examples/experiments/frontier.py

The result is in ``docs/results/frontier/``.
"""

from __future__ import annotations

import argparse
import functools
import random
from pathlib import Path
from typing import Any

import torch
from common import (
    BATCH,
    TEMPERATURE,
    Job,
    hardware,
    held_out,
    measure,
    options,
    paired,
    parallel,
    responses,
    sampling,
    stage,
    train,
    write,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastguide import ARGS, FUDGE, VAS, Engine, SamplingParams
from fastguide.assets import resolve
from fastguide.config import Plain
from fastguide.evaluate import Point, Runner, Study
from fastguide.evaluate.report import frontier
from fastguide.train.episodes import Episode
from fastguide.train.labels import load_episodes

MAX_TOKENS = 128
REWARD = "cheerfulness"
MASS = 0.95
"""Of the policy's distribution, that candidates must hold."""
BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128)


def main() -> None:
    """Run all stages; see ``--help``."""
    asked = options(__doc__ or "")
    seeds = range(asked.seeds)
    data = asked.work / f"data-{asked.prompts}"
    with stage("responses"):
        responses(asked.data / "train.txt", data, asked.prompts, MAX_TOKENS, {REWARD: REWARD})
    with stage("guides"):
        jobs = [job for seed in seeds for job in trainings(data, asked.work, seed)]
        parallel(jobs, asked.processes)
    with stage("measuring"):
        studies = {asked.work / f"frontier-{s}": study(asked, s) for s in seeds}
        results = measure(studies, asked.processes)
    with stage("candidates"):
        where, first = next(iter(studies.items()))
        needed = {p.name: candidates(p, first, where) for p in first.points if p.method == "VAS"}
    folder = asked.results / "frontier"
    k = VAS().k
    against = ("FUDGE", "Online FUDGE", "ARGS, stochastic")
    write(
        folder,
        results,
        asked,
        mass=MASS,
        k=k,
        candidates=needed,
        differences=paired(studies, [("VAS", other) for other in against]),
    )
    frontier(results, folder / "frontier.png", title="Cheerfulness, three seeds")
    held_out = "Held-out: VADER of the whole text"
    frontier(results, folder / "frontier-vader.png", y="vader", title=held_out)


def guide_folder(work: Path, name: str, seed: int) -> Path:
    """Where a guide of this experiment is."""
    return work / f"guides/{name}-{seed}"


def trainings(data: Path, work: Path, seed: int) -> list[Job]:
    """One guide of each kind from the same responses, with the settings that suit VAS."""

    def folder(name: str) -> Path:
        return guide_folder(work, name, seed)

    same = {"data": data, "labels": REWARD, "seed": seed}
    return [
        functools.partial(train, folder("vas"), **same),
        functools.partial(train, folder("online"), lam=1.0, **same),
        functools.partial(train, folder("fudge"), kind="fudge", **same),
        functools.partial(train_reward_model, folder("reward"), data, seed),
    ]


def train_reward_model(folder: Path, data: Path, seed: int) -> None:
    """A sequence reward model for ARGS, from pairs of responses to one prompt."""
    if (folder / "config.json").is_file():
        return
    import datasets
    from trl import RewardConfig

    from fastguide.train.preferences import train_reward

    config = RewardConfig(
        output_dir=str(folder),
        learning_rate=3e-4,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH // 2,  # pairs
        max_length=256,
        **hardware(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    rows = datasets.Dataset.from_list(pairs(data, seed))
    train_reward(rows, "stories", config, attn_implementation="eager")


def pairs(data: Path, seed: int) -> list[dict[str, str]]:
    """The better and the worse of each two responses."""
    tokenizer = Engine("stories", guides={}).tokenizer

    def text(episode: Episode) -> str:
        ids = episode.prompt_ids + episode.response_ids
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    groups: dict[tuple[int, ...], list[Episode]] = {}
    for episode in load_episodes(data, REWARD)[0]:
        groups.setdefault(episode.prompt_ids, []).append(episode)
    rows = []
    for group in groups.values():
        for one, other in zip(group[::2], group[1::2], strict=False):
            if one.reward != other.reward:
                best, worst = sorted((one, other), key=lambda e: -e.reward)
                rows.append({"chosen": text(best), "rejected": text(worst)})
    random.Random(seed).shuffle(rows)
    return rows


def points(seed: int) -> list[Point]:
    """All methods at all strengths."""
    usual, many = sampling(seed, MAX_TOKENS, n=2), sampling(seed, MAX_TOKENS, n=max(BEST_OF))
    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, seed=seed)
    found = [Point("policy", {}, Plain(), {}, usual)]
    for name, guide, betas in (
        ("VAS", "vas", (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)),
        ("Online FUDGE", "online", (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)),
    ):
        for beta in betas:
            found.append(Point(name, {"beta": beta}, VAS(beta=beta), {guide: 1.0}, usual))
    for weight in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
        rule = FUDGE(weight=weight)
        found.append(Point("FUDGE", {"weight": weight}, rule, {"fudge": 1.0}, usual))
    for weight in (0.25, 0.5, 1.0, 2.0, 4.0):
        args, reward = ARGS(weight=weight, k=10), {"reward": 1.0}
        found.append(Point("ARGS, stochastic", {"weight": weight}, args, reward, usual))
        found.append(Point("ARGS, greedy", {"weight": weight}, args, reward, greedy))
    return found + [Point("best-of-N", {"n": n}, Plain(), {}, many, best_of=n) for n in BEST_OF]


def study(asked: argparse.Namespace, seed: int) -> Study:
    """The comparison of one seed."""
    guides: dict[str, Any] = {
        name: str(guide_folder(asked.work, name, seed)) for name in ("vas", "online", "fudge")
    }
    guides["reward"] = f"reward:{guide_folder(asked.work, 'reward', seed)}"
    return Study(
        held_out(asked),
        points(seed),
        guides=guides,
        reward=REWARD,
        held_out={"vader": "vader"},
        baseline="policy",
        max_rows=128,
    )


@torch.inference_mode()
def candidates(point: Point, study: Study, folder: Path) -> float:
    """How many of a step's k candidates hold ``MASS`` of the policy's distribution, on average.

    So many would be scored if each step scored no more than it needs.
    """
    model = AutoModelForCausalLM.from_pretrained(resolve("stories"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(resolve("stories"))
    total = tokens = 0
    for row in Runner(study, folder).responses(point):
        prompt = tokenizer(study.prompts[row["prompt"]]).input_ids
        ids = tokenizer(row["text"], add_special_tokens=False).input_ids
        if ids:
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            mass = (logits / TEMPERATURE).softmax(-1).topk(point.rule.k).values.cumsum(-1)
            total += int((1 + (mass < MASS).sum(-1)).clamp(max=point.rule.k).sum())
            tokens += len(ids)
    return total / tokens


if __name__ == "__main__":
    main()
