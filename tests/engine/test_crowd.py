"""Very many requests of random shapes in a pool that is too small for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from crowds import Shape, crowd

from fastguide import Engine, FunctionGuide

Make = Callable[..., Engine]
SHAPE = Shape(
    vocabulary=60, shared=30, own=39, new=49, weights=(None, {"g": 1.0}, {"g": 1.0, "f": 0.5})
)


def brittle(tokens: list[int]) -> float:
    if tokens[-1] == 17:
        return math.nan
    if tokens[-1] == 18:
        raise ValueError("no such word")
    return 0.1


def check(engine: Engine, count: int, seed: int) -> None:
    outcome = crowd(engine, count, seed, SHAPE)
    assert outcome.cancelled
    assert outcome.errors
    assert all("guide 'f'" in error for error in outcome.errors)
    assert engine.stats.preemptions > 0
    assert [cache.capacity for cache in engine.stats.caches.values()] == [200, 200]


@pytest.mark.parametrize("prefixes", [True, False])
def test_a_crowd_in_a_short_pool(tiny_engine: Make, prefixes: bool) -> None:
    guides = {"f": FunctionGuide(brittle, on="tokens")}
    engine = tiny_engine(200, guides=guides, prefix_cache=prefixes, prefill_tokens=32, max_rows=16)
    check(engine, 150, seed=1)


@pytest.mark.slow
def test_a_larger_crowd(tiny_engine: Make) -> None:
    guides = {"f": FunctionGuide(brittle, on="tokens")}
    engine = tiny_engine(200, guides=guides, prefill_tokens=32, max_rows=24)
    check(engine, 1500, seed=2)
