"""What a reward is: texts in, numbers out; higher is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Sample(NamedTuple):
    """One response to judge."""

    prompt: str
    response: str
    tokens: int
    """Tokens of the response; an end of text that was produced counts as one."""


class Reward(Protocol):
    """Judges finished responses. To add one, write a class with these two and a ``per_token``."""

    @property
    def name(self) -> str:
        """How it is called in records; for what ``load_reward`` made, what it was made from."""
        ...

    @property
    def per_token(self) -> float:
        """The reward of every token, if it is a constant times the number of tokens; else 0."""
        ...

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The reward of each sample, in order."""
        ...


@dataclass(frozen=True)
class WeightedSum:
    """A weighted sum of rewards."""

    parts: tuple[tuple[float, Reward], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a sum needs at least one reward, got none")
        for weight, reward in self.parts:
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {reward.name} is {weight}; allowed are numbers")

    @property
    def name(self) -> str:
        """``1*cheerfulness + 0.1*brevity``; ``load_reward`` reads the ``specs``."""
        return " + ".join(self.specs)

    @property
    def specs(self) -> list[str]:
        """What it was made from, part by part."""
        return [f"{_short(weight)}*{reward.name}" for weight, reward in self.parts]

    @property
    def per_token(self) -> float:
        """The sum's, if every part has one."""
        each = [weight * reward.per_token for weight, reward in self.parts]
        return sum(each) if all(each) else 0.0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The sum for each sample."""
        columns = [(weight, reward(samples)) for weight, reward in self.parts]
        return [sum(w * values[i] for w, values in columns) for i in range(len(samples))]


def _short(weight: float) -> str:
    """All its digits, and no more."""
    return repr(float(weight)).removesuffix(".0")


def spec_of(reward: Reward) -> str | list[str]:
    """What ``load_reward`` makes such a reward from."""
    return reward.specs if isinstance(reward, WeightedSum) else reward.name


class Failure(NamedTuple):
    """A sample that a reward could not judge."""

    sample: int
    reason: str


def judge(reward: Reward, samples: Sequence[Sample]) -> tuple[list[float | None], list[Failure]]:
    """Rewards of all samples; one that cannot be judged takes no other with it.

    Returns:
        One number per sample, None where the reward raised or gave no finite number; and for
        each of those the reason.

    Raises:
        ValueError: the reward gives another number of results than it got samples.
    """
    values: list[float | None]
    try:
        values = list(_judged(reward, samples))
    except ReturnedCount:
        raise
    except Exception:  # which of them was it? Ask for each alone.
        values, failures = [], []
        for index, sample in enumerate(samples):
            try:
                values += _judged(reward, [sample])
            except ReturnedCount:
                raise
            except Exception as error:
                values.append(None)
                failures.append(Failure(index, f"{type(error).__name__}: {error}"))
    else:
        failures = []
    for index, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            values[index] = None
            failures.append(Failure(index, f"the reward is {value}"))
    return values, sorted(failures)


MOST_FAILURES = 0.05
"""Share of samples without a reward at which work stops."""


def check_failures(reward: str, failed: int, of: int, first: str) -> None:
    """Stop where too many samples have no reward.

    Args:
        reward: its name.
        failed: how many could not be judged.
        of: how many there are.
        first: one of those that failed, and why.

    Raises:
        ValueError: more than 5 % failed.
    """
    if failed > MOST_FAILURES * of:
        raise ValueError(
            f"reward {reward} failed on {failed} of {of} samples (allowed are 5 %), first on "
            f"{first}"
        )


def judge_or_raise(
    reward: Reward, samples: Sequence[Sample], where: Callable[[int], str]
) -> tuple[list[float | None], list[Failure]]:
    """``judge``, unless too many samples fail.

    Args:
        reward: judges.
        samples: responses.
        where: what to call a sample, by its index.

    Raises:
        ValueError: more than 5 % of the samples cannot be judged: how many, and why the first.
    """
    values, failures = judge(reward, samples)
    if failures:
        first = f"{where(failures[0].sample)}: {failures[0].reason}"
        check_failures(reward.name, len(failures), len(samples), first)
    return values, failures


class ReturnedCount(ValueError):
    """A reward does not give one number per sample."""


def _judged(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    values = [float(value) for value in reward(samples)]
    if len(values) != len(samples):
        raise ReturnedCount(
            f"reward {reward.name} gave {len(values)} numbers for {len(samples)} samples"
        )
    return values
