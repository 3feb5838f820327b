"""Rules: how guide scores change the base distribution. Plain data, no tensors.

A rule *lowers* to a few numbers per row before a step (``RowParameters``); kernels never see a
rule or a guide. To add a rule, add a dataclass here with ``k``, ``guided`` and ``lower``.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, NamedTuple

MAX_CANDIDATES = 256
"""Most candidates a rule may ask for, and what the kernels are built for."""

MAX_STRENGTH = 1e6
"""Largest β, w or weight of a guide; beyond it nothing changes but rounding."""

FILLS = ("mean", "none", "drop")
"""Fill modes; the index of a name is its code in ``kernels.reference.FILL_*``."""


class RowParameters(NamedTuple):
    """What a rule is to the sampling kernel (see ``kernels.reference.guide_sample``)."""

    k: int
    scale: float
    weight: float
    fill: int
    greedy: bool
    inv_temperature: float
    log_sigmoid: bool = False
    mass: float = 1.0
    """Of the base distribution: no more candidates are scored than hold it."""


def check_strength(name: str, value: float) -> None:
    """Refuse a strength or weight that is no number or would overflow.

    Raises:
        ValueError: naming it, its value and the range.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not abs(value) <= MAX_STRENGTH:
        raise ValueError(f"{name} is {value!r}; allowed are numbers from -1e6 to 1e6")


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= MAX_CANDIDATES:
        raise ValueError(f"k is {k!r}; allowed are whole numbers from 1 to {MAX_CANDIDATES}")


def _check_mass(mass: float) -> None:
    number = isinstance(mass, Real) and not isinstance(mass, bool)
    if not number or not 0 < mass <= 1:
        raise ValueError(f"candidate_mass is {mass!r}; allowed are numbers above 0 and up to 1")


def _temperature(temperature: float) -> tuple[bool, float]:
    """(greedy, 1/temperature); greedy decoding reads the distribution at temperature 1."""
    return (True, 1.0) if temperature == 0 else (False, 1.0 / temperature)


@dataclass(frozen=True)
class Plain:
    """The base model's own distribution; guides are not asked."""

    k: int = 63
    """How many tokens one pass over the vocabulary extracts; what is drawn is independent of it.
    The kernels take one column more, and 64 leaves little to draw from below."""

    guided = False

    def __post_init__(self) -> None:
        _check_k(self.k)

    def lower(self, temperature: float) -> RowParameters:
        """Parameters of a row at a sampling temperature (0 is greedy)."""
        greedy, inverse = _temperature(temperature)
        return RowParameters(self.k, 1.0, 0.0, 0, greedy, inverse)


@dataclass(frozen=True)
class VAS:
    """Value Augmented Sampling, eq. 4: ``π(x) ∝ π₀(x)·exp(β·V(s ⊕ x))`` on the top-k tokens.

    Attributes:
        beta: strength; 0 is the base model, negative values steer away.
        k: how many tokens are scored.
        fill: the value of all other tokens: ``mean`` of the candidates' (eq. 4), ``none`` for 0
            (the paper's ablation), ``drop`` to forbid them.
        candidate_mass: score only the most likely tokens that hold this much of the base
            distribution together, at most k of them; 1 scores all k. Most steps of a confident
            model need a few. Eq. 4 holds with that many candidates.
    """

    beta: float = 1.0
    k: int = 20
    fill: Literal["mean", "none", "drop"] = "mean"
    candidate_mass: float = 1.0

    guided = True

    def __post_init__(self) -> None:
        check_strength("beta", self.beta)
        _check_k(self.k)
        if self.fill not in FILLS:
            raise ValueError(f"fill is {self.fill!r}; allowed are {', '.join(FILLS)}")
        _check_mass(self.candidate_mass)

    def lower(self, temperature: float) -> RowParameters:
        """Parameters of a row at a sampling temperature (0 is greedy)."""
        greedy, inverse = _temperature(temperature)
        fill = FILLS.index(self.fill)
        return RowParameters(
            self.k, 1.0, self.beta, fill, greedy, inverse, mass=self.candidate_mass
        )


@dataclass(frozen=True)
class ARGS:
    """Alignment as Reward-Guided Search: the score of a candidate adds its reward.

    ``additive``: ``log π₀ + w·r`` (the published code); ``interpolated``: ``(1 − w)·log π₀ + w·r``
    (its summary). Tokens outside the top-k are dropped. Temperature 0 takes the best candidate
    (ARGS-greedy); above it samples from the softmax of score / temperature (ARGS-stochastic).

    Attributes:
        weight: ``w``; from 0 to 1 when interpolated.
        k: how many tokens are scored.
        form: ``additive`` or ``interpolated``.
        candidate_mass: score only the most likely tokens that hold this much of the base
            distribution together, at most k of them, and drop the others.
    """

    weight: float = 1.5
    k: int = 10
    form: Literal["additive", "interpolated"] = "additive"
    candidate_mass: float = 1.0

    guided = True

    def __post_init__(self) -> None:
        check_strength("weight", self.weight)
        _check_k(self.k)
        if self.form not in ("additive", "interpolated"):
            raise ValueError(f"form is {self.form!r}; allowed are additive, interpolated")
        if self.form == "interpolated" and not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight!r}; allowed when interpolated is 0 to 1")
        _check_mass(self.candidate_mass)

    def lower(self, temperature: float) -> RowParameters:
        """Parameters of a row at a sampling temperature (0 is greedy)."""
        greedy, inverse = _temperature(temperature)
        scale = 1.0 - self.weight if self.form == "interpolated" else 1.0
        weight = self.weight * inverse
        drop = FILLS.index("drop")
        return RowParameters(self.k, scale, weight, drop, greedy, inverse, mass=self.candidate_mass)


@dataclass(frozen=True)
class FUDGE:
    """Future discriminators: ``π(x) ∝ π₀(x)·σ(c(s ⊕ x))^w`` on the top-k tokens, 0 elsewhere.

    A guide gives the logit ``c`` of a classifier of prefixes; several guides multiply.

    Attributes:
        weight: exponent ``w``; 1 is Bayes' rule, as published.
        k: how many tokens are scored.
        candidate_mass: score only the most likely tokens that hold this much of the base
            distribution together, at most k of them, and drop the others.
    """

    weight: float = 1.0
    k: int = 20
    candidate_mass: float = 1.0

    guided = True

    def __post_init__(self) -> None:
        check_strength("weight", self.weight)
        _check_k(self.k)
        _check_mass(self.candidate_mass)

    def lower(self, temperature: float) -> RowParameters:
        """Parameters of a row at a sampling temperature (0 is greedy)."""
        greedy, inverse = _temperature(temperature)
        drop = FILLS.index("drop")
        return RowParameters(
            self.k, 1.0, self.weight, drop, greedy, inverse, True, self.candidate_mass
        )


Rule = Plain | VAS | ARGS | FUDGE
