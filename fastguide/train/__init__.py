"""Training: collections of responses, value models, classifiers of prefixes, reward models."""

from __future__ import annotations

import importlib

_WHERE = {
    "CollectConfig": "collect",
    "collect": "collect",
    "label": "collect",
    "load_episodes": "collect",
    "Episode": "episodes",
    "FudgeConfig": "fudge",
    "FudgeTrainer": "fudge",
    "early_stopping": "guides",
    "sweep": "guides",
    "train_guide": "guides",
    "train_reward": "preferences",
    "train_sft": "preferences",
    "make_validation": "validation",
    "validate": "validation",
    "ValueConfig": "value",
    "ValueTrainer": "value",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> object:
    """Loaded when asked for: trainers load more of transformers than decoding needs."""
    if name in _WHERE:
        module = importlib.import_module(f"fastguide.train.{_WHERE[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
