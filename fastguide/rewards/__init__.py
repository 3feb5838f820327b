"""Rewards: what judges a finished response; guides are trained on them and measured by them."""

from typing import TYPE_CHECKING

from fastguide.lazy import lazily
from fastguide.rewards.base import (
    MOST_FAILURES,
    Failure,
    Reward,
    Sample,
    WeightedSum,
    check_failures,
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

if TYPE_CHECKING:
    from fastguide.rewards.classifier import ClassifierReward as ClassifierReward

_HOME = {"ClassifierReward": "classifier"}

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
    "check_failures",
    "cheerfulness",
    "judge",
    "judge_or_raise",
    "load_reward",
    "sentences",
    "spec_of",
    "vader",
]

__getattr__, __dir__ = lazily(__name__, _HOME)
