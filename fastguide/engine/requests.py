"""From a call's arguments to validated requests."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastguide.config import Plain, Rule, check_strength
from fastguide.engine.samples import Request
from fastguide.guides.base import check_rule
from fastguide.request import SamplingParams


@dataclass(frozen=True)
class Limits:
    """What a model and its guides allow; knows no tensors."""

    vocabulary: int
    context: int | None
    guide_contexts: Mapping[str, int | None]
    guide_kinds: Mapping[str, str | None] = field(default_factory=dict)


def per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """One value per prompt: a list is taken as it is, anything else is shared by all.

    Raises:
        ValueError: for a list of another length.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name} has {len(value)} entries for {count} prompts; allowed is one each"
        )
    return list(value)


def build_request(
    index: int,
    tokens: Sequence[int],
    rule: Rule | None,
    weights: Mapping[str, float] | None,
    sampling: SamplingParams | None,
    limits: Limits,
) -> Request:
    """Validate one prompt's settings against the model.

    Raises:
        ValueError: one sentence with the received and the allowed value.
    """
    chosen = Plain() if rule is None else rule
    if not isinstance(chosen, Rule):
        raise ValueError(f"rule is {rule!r}; allowed are VAS(...), ARGS(...), Plain() and None")
    params = SamplingParams() if sampling is None else sampling
    if not isinstance(params, SamplingParams):
        raise ValueError(f"sampling is {sampling!r}; allowed is SamplingParams(...)")
    parameters = chosen.lower(params.temperature)
    if parameters.k > limits.vocabulary:
        if chosen.guided:
            raise ValueError(
                f"k is {parameters.k}; allowed are 1 to {limits.vocabulary} (vocabulary)"
            )
        parameters = parameters._replace(k=limits.vocabulary)
    outside = [token for token in tokens if not 0 <= token < limits.vocabulary]
    if outside:
        raise ValueError(
            f"the prompt has token id {outside[0]}; allowed are 0 to {limits.vocabulary - 1}"
        )
    used = _weights(chosen, weights, limits)
    for name in used:
        check_rule(chosen, name, limits.guide_kinds.get(name))
    contexts = {"model": limits.context} | {
        f"guide {name!r}": limits.guide_contexts[name] for name in used
    }
    owner, context = min(
        ((o, c) for o, c in contexts.items() if c is not None),
        key=lambda item: item[1],
        default=("model", None),
    )
    room = params.max_tokens if context is None else context - len(tokens)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens; the context of the {owner} is {context}, so "
            f"allowed are at most {context - 1 if context else 0}"
        )
    return Request(
        index=index,
        tokens=list(tokens),
        parameters=parameters,
        weights=used,
        sampling=params,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        max_tokens=min(params.max_tokens, room),
    )


def _weights(rule: Rule, weights: Mapping[str, float] | None, limits: Limits) -> dict[str, float]:
    """The guides a request uses, with their weights: by default each of the engine's with 1."""
    names = list(limits.guide_contexts)
    if not rule.guided:
        if weights:
            raise ValueError(
                f"weights is {dict(weights)!r}, but no guided rule is given; allowed rules with "
                "weights are VAS(...) and ARGS(...)"
            )
        return {}
    if not names:
        raise ValueError(f"rule is {rule!r}, but the engine has no guides; allowed is Plain()")
    if weights is None:
        return dict.fromkeys(names, 1.0)
    for name, weight in weights.items():
        if name not in limits.guide_contexts:
            raise ValueError(f"unknown guide {name!r} in weights; allowed are {', '.join(names)}")
        check_strength(f"weight of guide {name!r}", weight)
    return {name: float(weight) for name, weight in weights.items() if weight}
