"""Sequence-level rewards of responses, and their standard scale.

A reward maps a response (its text and its token ids, prompt excluded) to a float. Guides are
trained on standardised rewards, ``(raw - mean) / std`` over unguided rollouts, so that beta means
the same for every guide.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastguide.models.guide_config import RewardScale

Reward = Callable[[str, Sequence[int]], float]

_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’]))\s+""")


def sentences(text: str) -> list[str]:
    """Sentences of ``text``, split after ``.``, ``!`` or ``?`` and a closing quote, if any.

    A last sentence that is cut off counts as one.
    """
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def cheerfulness(text: str, token_ids: Sequence[int] = ()) -> float:
    """Mean VADER compound over the sentences of the response, in [-1, 1]; 0 without sentences.

    Over whole texts the compound saturates near 1; over sentences it does not.
    """
    parts = sentences(text)
    if not parts:
        return 0.0
    analyzer = _analyzer()
    return sum(analyzer.polarity_scores(part)["compound"] for part in parts) / len(parts)


def brevity(text: str, token_ids: Sequence[int] = ()) -> float:
    """Minus the number of response tokens (a produced eos counts as one)."""
    return -float(len(token_ids))


REWARDS: dict[str, Reward] = {"cheerfulness": cheerfulness, "brevity": brevity}

PER_TOKEN = {"brevity": -1.0}
"""Rewards that are a constant times the number of response tokens: that constant.

They are paid token by token, so that a value is what is still to come, and shifted so that its
mean over all states is 0, where a fresh head begins. It differs from the value of the same reward
paid at the end by what is past and by that shift, which all candidates of a step share: guidance
is the same, but the model need not count the past.
"""


def scale_of(name: str, raw: Sequence[float]) -> RewardScale:
    """Mean and standard deviation of raw rewards; ValueError when they do not vary."""
    if len(raw) < 2 or max(raw) == min(raw):
        raise ValueError(f"the reward {name!r} must vary over at least 2 responses")
    mean, std = statistics.fmean(raw), statistics.pstdev(raw)
    return RewardScale(name, mean, std, per_token=name in PER_TOKEN)


def standardise(raw: Iterable[float], scale: RewardScale) -> list[float]:
    """``(raw - mean) / std``, the unit in which guides are trained and reported."""
    return [(value - scale.mean) / scale.std for value in raw]


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("cheerfulness needs VADER: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()
