"""Very many requests of random shapes in caches too small for them: each must end exactly once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastguide import ARGS, VAS, Engine, SamplingParams
from fastguide.config import Rule
from fastguide.engine.samples import Request

CANCELLED = 0.05
"""Of requests."""
CROWDED = 64
"""Requests that live at once, at most."""


class Shape(NamedTuple):
    """What requests look like."""

    vocabulary: int
    shared: int
    """Tokens that prompts may begin with alike."""
    own: int
    """Most tokens of a prompt's own."""
    new: int
    """Most tokens of a response."""
    weights: tuple[dict[str, float] | None, ...]
    """Of guides; one is picked."""


class Outcome(NamedTuple):
    """What became of a crowd."""

    requests: int
    cancelled: int
    reasons: Counter[str]
    """Of samples."""
    errors: list[str]
    steps: int


def requests(engine: Engine, count: int, shape: Shape, rng: random.Random) -> Iterator[Request]:
    """Random prompts, rules, guides and sampling."""
    beginning = [rng.randrange(1, shape.vocabulary) for _ in range(shape.shared)]
    for number in range(count):
        cut, more = rng.randrange(shape.shared), rng.randrange(1, shape.own + 1)
        prompt = beginning[:cut] + [rng.randrange(1, shape.vocabulary) for _ in range(more)]
        k, mass = rng.randrange(1, 9), rng.choice([1.0, 0.5, 0.02])
        rules: list[Rule | None] = [None, VAS(2.0, k, candidate_mass=mass), ARGS(1.5, 4)]
        rule = rng.choice(rules)
        weights = rng.choice(shape.weights) if rule else None
        sampling = SamplingParams(
            rng.choice([0.0, 0.8, 1.3]),
            rng.randrange(1, shape.new + 1),
            seed=number,
            n=rng.randrange(1, 4),
            ignore_eos=True,
        )
        yield engine.request(prompt, rule, weights, sampling, number)


def crowd(
    engine: Engine,
    count: int,
    seed: int,
    shape: Shape,
    on_step: Callable[[int], None] = lambda ended: None,
) -> Outcome:
    """Let requests arrive at random, cancel some, and see that each ends once.

    Args:
        engine: with caches too small for all of them.
        count: of requests.
        seed: of everything.
        shape: of the requests.
        on_step: told after each step how many requests have ended.

    Raises:
        AssertionError: a sample ended twice or not at all, or slots were not given back.
    """
    rng = random.Random(seed)
    coming = requests(engine, count, shape, rng)
    loop = engine.loop
    live: dict[int, Request] = {}
    ends: dict[int, set[int]] = {}
    doomed: dict[int, int] = {}
    outcome = Outcome(count, 0, Counter(), [], 0)
    cancelled = ended = steps = 0
    more = True
    while more or live:
        for _ in range(rng.randrange(3) if len(live) < CROWDED else 0):
            request = next(coming, None)
            if request is None:
                more = False
                break
            live[request.index], ends[request.index] = request, set()
            if rng.random() < CANCELLED:
                doomed[request.index] = steps + rng.randrange(2 * shape.new)
            loop.add(request)
        loop.step()
        steps += 1
        for number, request in list(live.items()):
            for event in request.news.values():
                done = event.completion
                if done.finish_reason is not None:
                    assert done.sample not in ends[number], "a sample ended twice"
                    ends[number].add(done.sample)
                    outcome.reasons[done.finish_reason] += 1
                    outcome.errors.extend([done.error] if done.error else [])
            request.news.clear()
            if not request.live:
                assert ends[number] == set(range(request.sampling.n)), "a sample was lost"
            elif doomed.get(number, steps + 1) <= steps:
                loop.cancel(request)
                cancelled += 1
            else:
                continue
            del live[number], ends[number]
            ended += 1
        for cache in engine.stats.caches.values():
            assert cache.in_use <= cache.capacity
        assert loop.idle == (not live)
        on_step(ended)
    assert ended == count
    assert all(cache.in_use == 0 for cache in engine.stats.caches.values()), "slots were lost"
    engine.clear_prefixes()
    for pool in loop.caches.pools:
        assert pool.slots.available() == pool.slots.capacity, "slots were lost"
    return outcome._replace(cancelled=cancelled, steps=steps)
