"""Rewards that read the text alone: sentiment, length, patterns, checkers, Python functions."""

from __future__ import annotations

import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastguide.rewards.base import Sample

_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’]))\s+""")


def sentences(text: str) -> list[str]:
    """Sentences of ``text``, split after ``.``, ``!`` or ``?`` and a closing quote, if any.

    A last sentence that is cut off counts as one.
    """
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def vader(text: str) -> float:
    """VADER's compound sentiment of the whole text, in [-1, 1]; saturates on long texts."""
    return float(_analyzer().polarity_scores(text)["compound"])


def cheerfulness(text: str) -> float:
    """Mean VADER compound over the sentences of a text, in [-1, 1]; 0 without sentences.

    Over whole texts the compound saturates near 1; over sentences it does not.
    """
    parts = sentences(text)
    return sum(map(vader, parts)) / len(parts) if parts else 0.0


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("this reward needs VADER: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()


@dataclass(frozen=True)
class TextReward:
    """A function of the response's text."""

    name: str
    function: Callable[[str], float]
    per_token = 0.0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The function of each response."""
        return [self.function(sample.response) for sample in samples]


@dataclass(frozen=True)
class LengthReward:
    """A constant for every token of the response: 1 for long ones, -1 for short ones."""

    name: str
    per_token: float

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """That constant times the number of tokens."""
        return [self.per_token * sample.tokens for sample in samples]


class PatternReward:
    """1 where a regular expression is found in the response, else 0."""

    per_token = 0.0

    def __init__(self, pattern: str) -> None:
        self.name = f"regex:{pattern}"
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the pattern {pattern!r} cannot be read: {error}") from error

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1 or 0 for each response."""
        return [float(self._pattern.search(sample.response) is not None) for sample in samples]


class CheckerReward:
    """1 where a command accepts the response on its standard input (exit status 0), else 0.

    The prompt is in the environment variable ``PROMPT``. A command that is not there, or takes
    longer than ``seconds``, cannot judge.
    """

    per_token = 0.0

    def __init__(self, command: str, seconds: float = 60.0) -> None:
        self.name = f"checker:{command}"
        self._words = shlex.split(command)
        self._seconds = seconds
        if not self._words:
            raise ValueError("a checker needs a command, got none")

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1 or 0 for each response."""
        return [float(self._accepts(sample)) for sample in samples]

    def _accepts(self, sample: Sample) -> bool:
        done = subprocess.run(
            self._words,
            input=sample.response,
            env=os.environ | {"PROMPT": sample.prompt},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            timeout=self._seconds,
            check=False,
        )
        return done.returncode == 0


class FunctionReward:
    """A Python function ``(prompt, response) -> number``; True and False are 1 and 0."""

    per_token = 0.0

    def __init__(self, function: Callable[[str, str], Any], name: str | None = None) -> None:
        self.name = name or str(getattr(function, "__name__", "function"))
        self._function = function

    @classmethod
    def load(cls, where: str) -> FunctionReward:
        """Import ``module:function``; modules in the current folder are found, too.

        Raises:
            ValueError: there is no such module or function.
        """
        module, _, name = where.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the reward {where!r} cannot be imported: {error}") from error
        if not callable(function):
            raise ValueError(f"the reward {where!r} is a {type(function).__name__}, no function")
        return cls(function, where)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The function of each sample."""
        return [float(self._function(sample.prompt, sample.response)) for sample in samples]
