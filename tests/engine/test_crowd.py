"""Very many requests of random shapes in a pool that is too small for them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from fastguide import ARGS, VAS, Engine, FunctionGuide, SamplingParams

Make = Callable[..., Engine]


def in_use(engine: Engine) -> list[int]:
    return [cache.in_use for cache in engine.stats.caches.values()]


def crowd(engine: Engine, count: int, seed: int) -> None:
    """Requests of random shapes in a short pool, some cancelled, some failing: each ends once."""
    rng = random.Random(seed)
    shared = [rng.randrange(1, 60) for _ in range(30)]
    loop, live, ends = engine.loop, {}, {}
    added = cancelled = 0
    while added < count or live:
        for _ in range(rng.randrange(3) if added < count else 0):
            cut, more = rng.randrange(30), rng.randrange(1, 40)
            prompt = shared[:cut] + [rng.randrange(1, 60) for _ in range(more)]
            k, mass = rng.randrange(1, 9), rng.choice([1.0, 0.5, 0.02])
            rule = rng.choice([None, VAS(2.0, k, candidate_mass=mass), ARGS(1.5, 4)])
            weights = rng.choice([None, {"g": 1.0}, {"g": 1.0, "f": 0.5}]) if rule else None
            sampling = SamplingParams(
                rng.choice([0.0, 0.8, 1.3]),
                rng.randrange(1, 50),
                seed=added,
                n=rng.randrange(1, 4),
                ignore_eos=True,
            )
            request = engine.request(prompt, rule, weights, sampling, added)
            live[added] = request
            ends[added] = set()
            loop.add(request)
            added += 1
        loop.step()
        for number, request in list(live.items()):
            for event in request.news.values():
                if event.completion.finish_reason is not None:
                    assert event.completion.sample not in ends[number]
                    ends[number].add(event.completion.sample)
                    if event.completion.error:
                        assert "guide 'f'" in event.completion.error
            request.news.clear()
            if not request.live:
                assert ends[number] == set(range(request.sampling.n))
                del live[number]
            elif rng.random() < 0.05 / 40:
                loop.cancel(request)
                del live[number]
                cancelled += 1
        held = [cache.in_use for cache in engine.stats.caches.values()]
        assert max(held) <= 200
        assert loop.idle == (not live)
    assert cancelled
    assert engine.stats.preemptions > 0
    assert in_use(engine) == [0, 0]
    engine.clear_prefixes()
    assert [cache.cached for cache in engine.stats.caches.values()] == [0, 0]
    assert [pool.slots.available() for pool in loop.caches.pools] == [200, 200]


def brittle(tokens: list[int]) -> float:
    if tokens[-1] == 17:
        return math.nan
    if tokens[-1] == 18:
        raise ValueError("no such word")
    return 0.1


@pytest.mark.parametrize("prefixes", [True, False])
def test_a_crowd_in_a_short_pool(tiny_engine: Make, prefixes: bool) -> None:
    guides = {"f": FunctionGuide(brittle, on="tokens")}
    engine = tiny_engine(200, guides=guides, prefix_cache=prefixes, prefill_tokens=32, max_rows=16)
    crowd(engine, 150, seed=1)


@pytest.mark.slow
def test_a_larger_crowd(tiny_engine: Make) -> None:
    guides = {"f": FunctionGuide(brittle, on="tokens")}
    engine = tiny_engine(200, guides=guides, prefill_tokens=32, max_rows=24)
    crowd(engine, 1500, seed=2)
