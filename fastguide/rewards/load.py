"""Rewards by name, as the command line and records write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from fastguide.rewards.base import Reward, WeightedSum
from fastguide.rewards.text import (
    CheckerReward,
    FunctionReward,
    LengthReward,
    PatternReward,
    TextReward,
    cheerfulness,
    vader,
)

REWARDS: dict[str, Reward] = {
    "cheerfulness": TextReward("cheerfulness", cheerfulness),
    "vader": TextReward("vader", vader),
    "length": LengthReward("length", 1.0),
    "brevity": LengthReward("brevity", -1.0),
}
"""Rewards that have a name of their own."""

KINDS = (
    *REWARDS,
    "classifier:PATH[?on=text|pair|response|chat&label=NAME]",
    "regex:PATTERN",
    "checker:COMMAND",
    "MODULE:FUNCTION",
)
"""What ``load_reward`` reads."""

_WEIGHTED = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\*(.+)", re.IGNORECASE | re.DOTALL)


def load_reward(
    spec: str | Sequence[str],
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Reward:
    """The reward that a text describes, such as ``brevity`` or ``classifier:path?on=response``.

    Several texts are a sum; a text may begin with its weight (``0.1*brevity``).

    Args:
        spec: one of ``KINDS``, or several.
        device: where classifiers run; None picks CUDA where there is one.
        trust_remote_code: run code shipped with classifiers.
        weights: of classifiers; without them a reward has its name, but cannot judge.

    Raises:
        ValueError: naming the text, and what is allowed.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)

    def classifier(text: str) -> Reward:
        return _classifier(
            text, device=device, trust_remote_code=trust_remote_code, weights=weights
        )

    parts = [_weighted(text, classifier) for text in specs]
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    return WeightedSum(tuple(parts))


def _weighted(text: str, classifier: Callable[[str], Reward]) -> tuple[float, Reward]:
    found = _WEIGHTED.fullmatch(text)
    weight, rest = (float(found[1]), found[2]) if found else (1.0, text)
    return weight, _single(rest, classifier)


def _single(text: str, classifier: Callable[[str], Reward]) -> Reward:
    if text in REWARDS:
        return REWARDS[text]
    kind, colon, rest = text.partition(":")
    kinds: dict[str, Callable[[str], Reward]] = {
        "classifier": classifier,
        "regex": PatternReward,
        "checker": CheckerReward,
    }
    if colon and rest and kind in kinds:
        return kinds[kind](rest)
    if colon and rest and all(word.isidentifier() for word in kind.split(".")):
        return FunctionReward.load(text)
    raise ValueError(f"reward is {text!r}; allowed are {', '.join(KINDS)}")


def _classifier(text: str, **how: Any) -> Reward:
    from fastguide.rewards.classifier import ClassifierReward

    path, mark, query = text.rpartition("?")
    if not mark or Path(text).exists():
        path, query = text, ""
    options: dict[str, Any] = dict(parse_qsl(query))
    if unknown := sorted(set(options) - {"on", "label"}):
        raise ValueError(
            f"the classifier {text!r} has the option {unknown[0]!r}; allowed are on, label"
        )
    return ClassifierReward(path, **how, **options)
