"""Rewards: what judges a finished response; guides are trained on them and measured by them."""

from fastguide.rewards.base import Failure, Reward, Sample, WeightedSum, judge
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
    "load_reward",
    "sentences",
    "vader",
]


def __getattr__(name: str) -> object:
    """``ClassifierReward`` loads transformers, which the other rewards do not need."""
    if name == "ClassifierReward":
        from fastguide.rewards.classifier import ClassifierReward

        return ClassifierReward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
