"""What cheerfulness costs: KL-reward frontiers of VAS, FUDGE, Online FUDGE, ARGS and best-of-N.

    python examples/frontier/run.py

Three seeds, two CPU cores; finished stages are skipped and a killed one continues. The result is in
``docs/results/frontier/``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples/stories"))

from prompts import heldout_prompts, read_stories, training_prompts  # noqa: E402

from fastguide import ARGS, FUDGE, VAS, Engine, SamplingParams  # noqa: E402
from fastguide.config import Plain  # noqa: E402
from fastguide.evaluate import Point, Runner, Study  # noqa: E402
from fastguide.evaluate.report import frontier, pooled, table  # noqa: E402
from fastguide.rewards import load_reward  # noqa: E402
from fastguide.train.collect import CollectConfig, collect, label, load_episodes  # noqa: E402
from fastguide.train.fudge import FudgeConfig  # noqa: E402
from fastguide.train.guides import train_guide  # noqa: E402
from fastguide.train.value import ValueConfig  # noqa: E402

SEEDS = (0, 1, 2)
MAX_TOKENS = 128
RESULTS = ROOT / "docs/results/frontier"


def main() -> None:
    """Run all stages; see ``--help``."""
    options = _parse()
    torch.set_num_threads(options.threads)
    data = options.work / "data"
    _stage("responses", lambda: make_data(options, data))
    results = []
    for seed in SEEDS[: options.seeds]:
        folder = options.work / f"seed-{seed}"
        _stage(f"guides, seed {seed}", lambda f=folder, s=seed: make_guides(data, f, s))
        _stage(f"measure, seed {seed}", lambda f=folder, s=seed: measure(options, f, s))
        results.append(json.loads((folder / "study/results.json").read_text(encoding="utf-8")))
    write(pooled(results), options)


def make_data(options: argparse.Namespace, folder: Path) -> None:
    """Unguided responses to openings of training stories, and their cheerfulness."""
    engine = Engine("stories", guides={}, max_rows=64)
    texts = training_prompts(read_stories(options.data / "train.txt"), options.prompts, seed=1)
    ids = engine.tokenizer(texts).input_ids
    config = CollectConfig(samples_per_prompt=2, max_tokens=MAX_TOKENS, seed=1)
    collect(engine, ids, folder, config, policy=engine.policy)
    tokenizer = engine.tokenizer
    label(
        folder,
        load_reward("cheerfulness"),
        lambda i: str(tokenizer.decode(list(i), skip_special_tokens=True)),
    )


def settings(folder: Path, seed: int, **more: Any) -> dict[str, Any]:
    """What all trainings share."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "ema": 0.99,
        "bf16": True,
        "use_cpu": True,
        "save_strategy": "epoch",
        "disable_tqdm": True,
        "seed": seed,
        **more,
    }


def make_guides(data: Path, folder: Path, seed: int) -> None:
    """One guide of each kind, from the same responses; the learning rate is VAS' for all."""
    trained: dict[str, Callable[[Path], Any]] = {
        "vas": lambda out: train_guide(
            "value", data, "stories", ValueConfig(**settings(out, seed))
        ),
        "online": lambda out: train_guide(
            "value", data, "stories", ValueConfig(**settings(out, seed, lam=1.0))
        ),
        "fudge": lambda out: train_guide(
            "fudge", data, "stories", FudgeConfig(**settings(out, seed))
        ),
        "reward": lambda out: make_reward_model(data, out, seed),
    }
    for name, train in trained.items():
        done = folder / name / "done"
        if not done.is_file():
            train(folder / name)
            done.touch()


def make_reward_model(data: Path, folder: Path, seed: int) -> None:
    """A sequence reward model for ARGS, from pairs of responses to one prompt."""
    import datasets
    from trl import RewardConfig

    from fastguide.train.preferences import train_reward

    episodes, _ = load_episodes(data)
    groups: dict[tuple[int, ...], list[Any]] = {}
    for episode in episodes:
        groups.setdefault(episode.prompt_ids, []).append(episode)
    tokenizer = Engine("stories", guides={}).tokenizer

    def text(episode: Any) -> str:
        return str(
            tokenizer.decode(episode.prompt_ids + episode.response_ids, skip_special_tokens=True)
        )

    rows = []
    for group in groups.values():
        for one, other in zip(group[::2], group[1::2], strict=False):
            if one.reward != other.reward:
                best, worst = sorted((one, other), key=lambda e: -e.reward)
                rows.append({"chosen": text(best), "rejected": text(worst)})
    random.Random(seed).shuffle(rows)
    config = RewardConfig(
        output_dir=str(folder),
        learning_rate=3e-4,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        max_length=256,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    train_reward(datasets.Dataset.from_list(rows), "stories", config)


def points(seed: int) -> list[Point]:
    """All methods at all strengths."""
    usual = SamplingParams(temperature=0.7, max_tokens=MAX_TOKENS, seed=seed, n=4)
    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, seed=seed)
    many = SamplingParams(temperature=0.7, max_tokens=MAX_TOKENS, seed=seed, n=128)
    found = [Point("policy", {}, Plain(), {}, usual)]
    for beta in (0.5, 1.0, 2.0, 4.0, 8.0):
        found.append(Point("VAS", {"beta": beta}, VAS(beta=beta), {"vas": 1.0}, usual))
        online = {"online": 1.0}
        found.append(Point("Online FUDGE", {"beta": beta}, VAS(beta=beta), online, usual))
    for weight in (1.0, 2.0, 4.0, 8.0, 16.0):
        found.append(
            Point("FUDGE", {"weight": weight}, FUDGE(weight=weight), {"fudge": 1.0}, usual)
        )
    for weight in (0.25, 0.5, 1.0, 2.0):
        rule = ARGS(weight=weight, k=10)
        found.append(Point("ARGS, stochastic", {"weight": weight}, rule, {"reward": 1.0}, usual))
        found.append(Point("ARGS, greedy", {"weight": weight}, rule, {"reward": 1.0}, greedy))
    for n in (1, 2, 4, 8, 16, 32, 64, 128):
        found.append(Point("best-of-N", {"n": n}, Plain(), {}, many, best_of=n))
    return found


def measure(options: argparse.Namespace, folder: Path, seed: int) -> None:
    """The study of one seed."""
    prompts = heldout_prompts(read_stories(options.data / "valid.txt"), options.judged)
    guides = {name: str(folder / name) for name in ("vas", "online", "fudge")}
    study = Study(
        prompts,
        points(seed),
        guides={**guides, "reward": f"reward:{folder / 'reward'}"},
        reward="cheerfulness",
        held_out={"vader": "vader"},
        baseline="policy",
        max_rows=128,
    )
    Runner(study, folder / "study").run()


def write(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Table, plots and record."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "table.md").write_text(table(results), encoding="utf-8")
    frontier(results, RESULTS / "frontier.png", title="Cheerfulness, three seeds")
    frontier(
        results, RESULTS / "frontier-vader.png", y="vader", title="Held-out: VADER, whole text"
    )
    print(table(results))


def _stage(name: str, work: Callable[[], None]) -> None:
    started = time.perf_counter()
    print(f"{name} …", flush=True)
    work()
    print(f"{name}: {(time.perf_counter() - started) / 60:.1f} min", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="KL-reward frontiers of all methods")
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        default=ROOT.parent / "shared/data/stories",
        help="train.txt, valid.txt",
    )
    add("--work", type=Path, default=ROOT / "runs/frontier", help="folder of unfinished work")
    add("--prompts", type=int, default=3000, help="training prompts, two responses each")
    add("--judged", type=int, default=64, help="held-out prompts")
    add("--seeds", type=int, default=len(SEEDS), help="how many seeds")
    add("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
