"""Requests and samples while they live: what they hold, what they have, what they need. No tensors.

A request's prompt is computed once (``Prefill``), then its samples are forked off it (``Sample``).
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastguide.config import RowParameters
from fastguide.engine.caches import Caches
from fastguide.engine.rows import Row, RowSpec
from fastguide.engine.sampler import Step
from fastguide.engine.scheduler import Order, Slots
from fastguide.engine.text import TextStream
from fastguide.request import Completion, FinishReason, SamplingParams, sample_seed


class Event(NamedTuple):
    """News of a sample: it has a new token, or has ended."""

    request: Request | None
    """None for prompts that were refused before they became one."""
    completion: Completion
    text: TextStream | None
    """None for samples that could not be started."""


@dataclass(eq=False)
class Request:
    """One validated prompt with everything its samples need, and those of them that live."""

    index: int
    tokens: list[int]
    parameters: RowParameters
    weights: dict[str, float]
    sampling: SamplingParams
    seed: int
    max_tokens: int
    order: Order = (0, 0)
    """Of arrival."""
    caches: Caches | None = None
    uses: Slots = field(init=False)
    """``[P]``: how many sequences a sample is in each cache."""
    scratch: Slots = field(init=False)
    """``[P]``: slots that the candidates of a step take."""
    news: dict[int, Event] = field(default_factory=dict)
    """What the caller has yet to see, by the identity of the completion; may be shared."""
    told: list[Event] = field(default_factory=list)
    """The same, of all requests of a loop in the step that is being made; set by the loop."""
    refused: str | None = None
    """Why samples could not be started."""
    stem: Row | None = None
    """The prompt in every model: samples are forked off it, and the last one takes it."""
    begun: int = 0
    """Samples that were started."""
    filling: int = 0
    """Samples whose prompt is being computed."""
    samples: list[Sample] = field(default_factory=list)
    """Those that have started and not ended, pre-empted ones among them."""

    @property
    def waiting(self) -> int:
        """Samples that have yet to start."""
        return 0 if self.refused is not None else self.sampling.n - self.begun - self.filling

    @property
    def live(self) -> bool:
        """Whether anything of it has yet to end."""
        return bool(self.waiting or self.filling or self.samples)

    @property
    def prompt(self) -> RowSpec:
        """What the runner opens: the stem, with the seed of the sample that takes it."""
        seed = sample_seed(self.seed, self.sampling.n - 1)
        return RowSpec(self.tokens, self.parameters, self.weights, seed)

    def enter(self, caches: Caches, number: int, told: list[Event]) -> None:
        """Take a place in the order of arrival, and note what samples take of the caches."""
        self.order, self.caches, self.told = (number, 0), caches, told
        self.uses = caches.uses(self.weights)
        self.scratch = caches.scratch(self.weights, self.parameters.k)

    def growth(self, tokens: int) -> Slots:
        """``[P]``: slots that a new sample takes for its first tokens, and for candidates."""
        return self.slots(min(tokens, self.max_tokens))

    def slots(self, tokens: int) -> Slots:
        """``[P]``: slots of so many tokens of a sample, and of the candidates of a step."""
        return tokens * self.uses + self.scratch

    def opening(self) -> Slots:
        """``[P]``: slots that its prompt takes, if it is not there already."""
        if self.stem is not None:
            return 0 * self.uses
        assert self.caches is not None
        return self.caches.opening(self.tokens, self.weights)

    def unfit(self) -> str | None:
        """Why the caches can never hold one of its samples; None if they can."""
        assert self.caches is not None
        needed, there = self.slots(len(self.tokens) + self.max_tokens), self.caches.capacity
        worst = int((needed - there).argmax())
        own, all_of_it, name = needed[worst], there[worst], self.caches.names[worst]
        if own <= all_of_it:
            return None
        return (
            f"a sample needs {own:,} slots in the cache of the {name} ({len(self.tokens):,} prompt "
            f"tokens, {self.max_tokens:,} new ones, and its candidates), and there are "
            f"{all_of_it:,}; allowed are a smaller max_tokens and a larger kv_memory"
        )

    def start(self, tokenizer: PreTrainedTokenizerBase, now: float) -> Sample:
        """Start the next sample, with a seed of its own.

        Args:
            tokenizer: decodes its text.
            now: the time from which its seconds count.
        """
        assert self.stem is not None, "a prompt is computed before its samples start"
        i = self.begun
        last = i == self.sampling.n - 1
        row = self.stem if last else self.stem.fork(sample_seed(self.seed, i))
        text = TextStream(tokenizer, self.tokens, self.sampling.stop)
        completion = Completion(self.index, i, seed=row.seed, prompt_tokens=len(self.tokens))
        sample = Sample(self, row, text, completion, now, (self.order[0], i))
        self.samples.append(sample)
        self.begun += 1
        if last:
            self.stem = None
        return sample

    def refuse(self, reason: str) -> None:
        """Start no more samples; those that run go on. The caller is told with one completion."""
        self.refused = f"prompt {self.index}: {reason}"
        self.drop_stem()
        refused = Completion(self.index, self.begun, finish_reason="error", error=self.refused)
        self.tell(refused, None)

    def tell(self, completion: Completion, text: TextStream | None) -> None:
        """Put news where the caller finds them, once for each sample."""
        event = Event(self, completion, text)
        self.news[id(completion)] = event
        self.told.append(event)

    def drop_stem(self, publish: bool = True) -> None:
        """Give the prompt's slots back; it is computed again where samples have yet to start."""
        if self.stem is not None:
            stem, self.stem = self.stem, None
            if publish:
                stem.publish()
            stem.close()


@dataclass(eq=False)
class Sample:
    """One sample that has started: its row, its text so far, its completion so far."""

    request: Request
    row: Row | None
    """None while it is pre-empted."""
    text: TextStream
    completion: Completion
    started: float
    order: Order

    @property
    def spec(self) -> RowSpec:
        """What the runner opens to go on where it was: draws depend on the position only."""
        request, made = self.request, self.completion.token_ids
        tokens = [*request.tokens, *made]
        return RowSpec(tokens, request.parameters, request.weights, self.completion.seed, len(made))

    def opening(self) -> Slots:
        """``[P]``: slots that its tokens so far take, those aside that others hold anyway."""
        assert self.request.caches is not None
        return self.request.caches.opening(self.spec.tokens, self.request.weights)

    def growth(self, tokens: int) -> Slots:
        """``[P]``: slots that it takes for its next tokens, and for candidates."""
        left = self.request.max_tokens - len(self.completion.token_ids)
        needed = self.request.slots(min(tokens, left))
        if self.row is None:
            return needed
        assert self.request.caches is not None
        needed = needed + self.request.caches.owed(self.row.states)
        return np.maximum(0, needed - self.request.caches.ahead(self.row.sequence, self.row.states))

    def take(
        self, step: Step, i: int, score: float | None, end_tokens: Collection[int]
    ) -> FinishReason | None:
        """Take the token of row ``i`` of a step; returns why the sample ends with it, if it does.

        Args:
            step: of all rows.
            i: the sample's row.
            score: the composed score of its token.
            end_tokens: those that end a response.
        """
        sampling, token, done = self.request.sampling, step.tokens[i], self.completion
        done.token_ids.append(token)
        done.logprobs.append(step.logprobs[i])
        done.base_logprobs.append(step.base_logprobs[i])
        done.kl.append(step.kl[i])
        done.scores.append(score)
        done.scored.append(step.scored[i])
        ends = token in end_tokens and not sampling.ignore_eos
        if ends or token in sampling.stop_token_ids or self.text.add(token):
            return "stop"
        return "length" if len(done.token_ids) >= self.request.max_tokens else None

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the sample, give its slots back and tell its caller."""
        self.text.finish()
        done = self.completion
        done.text, done.finish_reason, done.error = self.text.text, reason, error
        done.seconds = time.perf_counter() - self.started
        self.release(publish=reason != "error")
        self.request.tell(done, self.text)  # before it is out of reach, should an interrupt come
        self.request.samples.remove(self)

    def release(self, publish: bool = True) -> None:
        """Give its slots back; with ``publish`` others may use them again until they are needed."""
        if self.row is not None:
            row, self.row = self.row, None
            if publish:
                row.publish()
            row.close()


@dataclass(eq=False)
class Prefill:
    """A prompt that is being computed: for the next samples of a request, or to resume one."""

    request: Request
    row: Row
    rows: int
    """Samples that wait for it."""
    order: Order
    sample: Sample | None = None
    """The one that was pre-empted."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def uses(self) -> Slots:
        """``[P]``: how many sequences it is in each cache."""
        return self.request.uses

    def left(self) -> int:
        """Tokens to compute in the cache that has most to do."""
        return max(0, self.row.length - self.row.computed)

    def growth(self, tokens: int) -> Slots:
        """``[P]``: slots that all its samples take for their next tokens."""
        return self.rows * (self.sample or self.request).growth(tokens)
