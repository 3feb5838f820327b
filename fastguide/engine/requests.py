"""From a call's arguments to validated requests, and from running rows to completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastguide.config import Plain, RowParameters, Rule, check_strength
from fastguide.engine.runner import Row, RowSpec
from fastguide.engine.text import TextStream
from fastguide.guides.base import check_rule
from fastguide.request import Completion, FinishReason, SamplingParams, sample_seed


@dataclass(frozen=True)
class Limits:
    """What a model and its guides allow; knows no tensors."""

    vocabulary: int
    context: int | None
    guide_contexts: Mapping[str, int | None]
    guide_kinds: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(eq=False)
class Request:
    """One validated prompt with everything its samples need, and those of them that run."""

    index: int
    tokens: list[int]
    parameters: RowParameters
    weights: dict[str, float]
    sampling: SamplingParams
    seed: int
    max_tokens: int
    refused: str | None = None
    """Why samples could not be started."""
    stem: Row | None = None
    """The prompt in every model: samples are forked off it, and the last one takes it."""
    begun: int = 0
    """Samples that were started."""
    samples: list[Sample] = field(default_factory=list)
    """Those that run."""

    @property
    def waiting(self) -> int:
        """Samples that have yet to start."""
        return 0 if self.refused is not None else self.sampling.n - self.begun

    @property
    def rows(self) -> int:
        """Batch rows it takes up now."""
        return len(self.samples)

    @property
    def prompt(self) -> RowSpec:
        """What the runner opens: the stem, with the seed of the sample that takes it."""
        seed = sample_seed(self.seed, self.sampling.n - 1)
        return RowSpec(self.tokens, self.parameters, self.weights, [seed])

    def start(self, count: int, tokenizer: PreTrainedTokenizerBase, now: float) -> None:
        """Start the next samples, each with a seed of its own.

        Args:
            count: how many.
            tokenizer: decodes their texts.
            now: the time from which their seconds count.
        """
        assert self.stem is not None, "a request is opened before its samples start"
        for i in range(self.begun, self.begun + count):
            last = i == self.sampling.n - 1
            row = self.stem if last else self.stem.fork(sample_seed(self.seed, i))
            text = TextStream(tokenizer, self.tokens, self.sampling.stop)
            completion = Completion(self.index, i, seed=row.seed, prompt_tokens=len(self.tokens))
            self.samples.append(Sample(self, row, text, completion, now))
            self.begun += 1
        if not self.waiting:
            self.stem = None

    def refuse(self, reason: str) -> None:
        """Start no more samples; those that run go on."""
        self.refused = f"prompt {self.index}: {reason}"
        if self.stem is not None:
            self.stem.close()
            self.stem = None

    def close(self) -> None:
        """Give back every slot."""
        for row in (self.stem, *(sample.row for sample in self.samples)):
            if row is not None:
                row.close()


@dataclass(eq=False)
class Sample:
    """One running sample: its row, its text so far, its completion so far."""

    request: Request
    row: Row
    text: TextStream
    completion: Completion
    started: float

    @property
    def running(self) -> bool:
        """Whether it has yet to end."""
        return self.completion.finish_reason is None

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the sample, give its slots back and make room for another."""
        self.text.finish()
        done = self.completion
        done.text, done.finish_reason, done.error = self.text.text, reason, error
        done.seconds = time.perf_counter() - self.started
        self.row.close()
        self.request.samples.remove(self)


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
