"""Small training runs: episodes whose reward can be learnt, a model and settings."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from fastguide.models.value import ValueModel
from fastguide.train.episodes import Episode


def make_episodes(count: int, seed: int) -> list[Episode]:
    """Random tokens; the reward says whether the first response token is a small number."""
    rng = random.Random(seed)
    episodes = []
    for _ in range(count):
        prompt = (0, *(rng.randrange(1, 2048) for _ in range(rng.randrange(1, 4))))
        first = rng.choice([300, 1500])
        rest = tuple(rng.randrange(1, 2048) for _ in range(rng.randrange(2, 8)))
        episodes.append(Episode(prompt, (first, *rest), 1.0 if first == 300 else -1.0))
    return episodes


def make_model(**options: Any) -> ValueModel:
    torch.manual_seed(0)
    return ValueModel.create("stories", **({"lora_rank": 4} | options))


def settings(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "learning_rate": 3e-3,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "seed": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **others,
    }
