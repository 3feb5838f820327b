"""Which samples run and which prompts are computed: first come, first served. No tensors here.

A sample *waits* with its request, then its prompt is *filling* the caches in chunks, then it is
*running*: each step gives it a token. One that has to make room is *pre-empted*: its slots are
given back, and it fills the caches again, with the tokens it has, before any request that waits.

Slots are counted per cache as vectors ``[P]`` int64, in the order of the runner's caches.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from typing import Generic, Protocol, TypeVar

import numpy as np

Slots = np.ndarray
Order = tuple[int, int]
"""Of arrival: the number of a request, and of the sample in it."""

HEADROOM = 16
"""Tokens for which a sample must find slots, and leave them to those that run, when it starts:
else it would soon be pre-empted, and its prompt be computed again for a few tokens."""


class Waiting(Protocol):
    """A request some of whose samples have yet to start."""

    order: Order

    @property
    def waiting(self) -> int:
        """Samples that have not started."""

    def opening(self) -> Slots:
        """Slots that its prompt takes; 0 where samples can be forked off what is there."""

    def growth(self, tokens: int) -> Slots:
        """Slots that a sample takes for its first tokens, at most as many as it may get."""


class Filling(Protocol):
    """A prompt that is being computed, for one sample or several of a request."""

    order: Order
    rows: int

    def left(self) -> int:
        """Tokens to compute in the cache that has most to do."""

    def growth(self, tokens: int) -> Slots:
        """Slots that all its samples take for their next tokens, candidates included."""

    @property
    def uses(self) -> Slots:
        """How many sequences it is in each cache."""


class Running(Protocol):
    """A sample that gets a token at each step, or was pre-empted."""

    order: Order

    def opening(self) -> Slots:
        """Slots that its tokens so far take when it is resumed."""

    def growth(self, tokens: int) -> Slots:
        """Slots that it takes for its next tokens, at most as many as it may get."""


W = TypeVar("W", bound=Waiting)
F = TypeVar("F", bound=Filling)
R = TypeVar("R", bound=Running)


class Scheduler(Generic[W, F, R]):
    """Queues of requests and samples, and who comes next."""

    def __init__(self, max_rows: int, budget: int) -> None:
        """Empty queues.

        Args:
            max_rows: most samples that run or fill at once; may be changed at any time.
            budget: most prompt tokens that one step computes.
        """
        self.max_rows = max_rows
        self.budget = budget
        self.waiting: deque[W] = deque()
        self.preempted: list[R] = []
        self.filling: list[F] = []
        self.running: list[R] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.preempted or self.filling or self.running)

    def next_sample(self, free: Slots) -> R | None:
        """The pre-empted sample that is to be resumed now, if there is room for it.

        Args:
            free: slots that can be had in each cache.
        """
        if not self.preempted or self._room() < 1:
            return None
        sample = self.preempted[0]
        if self.running or self.filling:
            needed = sample.opening() + sample.growth(HEADROOM)
            if (needed > free - self._promised()).any():
                return None
        return self.preempted.pop(0)

    def next_request(self, free: Slots) -> tuple[W, int] | None:
        """The request of which samples are to start now, and how many of them.

        Nobody overtakes: where the first does not fit, the others wait with it.
        """
        while self.waiting and not self.waiting[0].waiting:
            self.waiting.popleft()
        count = self._room()
        if self.preempted or not self.waiting or count < 1:
            return None
        request = self.waiting[0]
        count = min(count, request.waiting)
        each = request.growth(HEADROOM)
        left = free - self._promised() - request.opening()
        fitting = int((left[each > 0] // each[each > 0]).min(initial=count))
        if fitting < 1 and (self.running or self.filling):
            return None
        return request, max(1, min(count, fitting))

    def chunks(self, free: Slots) -> list[tuple[F, int]]:
        """How many tokens of each filling prompt to compute now, in order of arrival.

        Those that run keep the slots of their next token.
        """
        left = free - sum((sample.growth(1) for sample in self.running), np.zeros_like(free))
        budget = self.budget
        plan: list[tuple[F, int]] = []
        for work in self.filling:
            uses = work.uses
            fitting = int((left[uses > 0] // uses[uses > 0]).min(initial=budget))
            count = min(work.left(), budget, max(0, fitting))
            if count or not work.left():
                plan.append((work, count))
            left = left - count * uses
            budget -= count
        return plan

    def short(self, free: Slots) -> bool:
        """Whether those that run cannot all have the slots of their next token."""
        needed = sum((sample.growth(1) for sample in self.running), np.zeros_like(free))
        return bool((needed > free).any())

    def last(self) -> F | R | None:
        """Who came last of those that run or fill: the one that makes room."""
        works: list[F | R] = [*self.filling, *self.running]
        return max(works, key=lambda work: work.order, default=None)

    def fill(self, work: F) -> None:
        """Let a prompt fill the caches."""
        insort(self.filling, work, key=lambda w: w.order)

    def run(self, sample: R) -> None:
        """Let a sample run, whose prompt is computed."""
        insort(self.running, sample, key=lambda s: s.order)

    def preempt(self, sample: R) -> None:
        """Let a sample that ran or filled wait until there is room again."""
        if sample in self.running:
            self.running.remove(sample)
        insort(self.preempted, sample, key=lambda s: s.order)

    def return_request(self, request: W) -> None:
        """Let samples wait again whose prompt was filling; their request came last."""
        if not self.waiting or self.waiting[0] is not request:
            self.waiting.appendleft(request)

    def _room(self) -> int:
        return self.max_rows - len(self.running) - sum(work.rows for work in self.filling)

    def _promised(self) -> Slots:
        """Slots that those who run or fill will take soon."""
        grown = [sample.growth(HEADROOM) for sample in self.running]
        grown += [work.growth(HEADROOM) for work in self.filling]
        grown += [work.left() * work.uses for work in self.filling]
        return sum(grown, np.zeros((), np.int64))
