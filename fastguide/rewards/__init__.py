"""Rewards: what judges a finished response; guides are trained on them and measured by them."""

from fastguide.rewards.base import (
    MOST_FAILURES,
    Failure,
    Reward,
    Sample,
    WeightedSum,
    judge,
    judge_or_raise,
    spec_of,
)
from fastguide.rewards.load import KINDS, REWARDS, load_reward
from fastguide.rewards.text import (
    CheckerReward,
    FunctionReward,
    LengthReward,
    PatternReward,
    TextReward,
    cheerfulness,
    sentences,
    vader,
)

__all__ = [
    "KINDS",
    "MOST_FAILURES",
    "REWARDS",
    "CheckerReward",
    "ClassifierReward",
    "Failure",
    "FunctionReward",
    "LengthReward",
    "PatternReward",
    "Reward",
    "Sample",
    "TextReward",
    "WeightedSum",
    "cheerfulness",
    "judge",
    "judge_or_raise",
    "load_reward",
    "sentences",
    "spec_of",
    "vader",
]


def __getattr__(name: str) -> object:
    """``ClassifierReward`` loads transformers, which the other rewards do not need."""
    if name == "ClassifierReward":
        from fastguide.rewards.classifier import ClassifierReward

        return ClassifierReward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
