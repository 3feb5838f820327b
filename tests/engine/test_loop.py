"""Continuous batching: whatever joins, waits, makes room or leaves, the tokens stay the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fastguide import (
    ARGS,
    VAS,
    Completion,
    Engine,
    FunctionGuide,
    SamplingParams,
    ValueGuide,
    kernels,
)
from fastguide.cache import CachedSequence
from fastguide.config import Rule
from fastguide.engine.rows import Row

Make = Callable[..., Engine]

PROMPTS = [
    [(7 * i + 3 * j) % 62 + 1 for j in range(n)] for i, n in enumerate((40, 3, 17, 25, 9, 33))
]
RULES: list[Rule | None] = [
    VAS(3.0, 5),
    None,
    ARGS(2.0, 4),
    VAS(-2.0, 8, "drop"),
    VAS(5.0, 3),
    None,
]
SAMPLINGS = [
    SamplingParams(temperature=0.9, max_tokens=30, seed=i, n=1 + i % 3, ignore_eos=True)
    for i in range(6)
]


def ids(outputs: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in outputs]


def in_use(engine: Engine) -> list[int]:
    return [cache.in_use for cache in engine.stats.caches.values()]


def run(engine: Engine) -> list[Completion]:
    return engine.generate(PROMPTS, RULES, None, SAMPLINGS)


@pytest.fixture(scope="module")
def expected(tiny_engine: Make) -> list[Completion]:
    """Each request alone, without a prefix cache, its prompt in one piece."""
    engine = tiny_engine(prefix_cache=False, prefill_tokens=1000)
    calls = zip(PROMPTS, RULES, SAMPLINGS, strict=True)
    found = [c for p, r, s in calls for c in engine.generate([p], r, None, s)]
    assert engine.stats.prefix_hits == 0
    return found


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_chunked_prefill_equals_whole_prefill(
    tiny_engine: Make, expected: list[Completion], tokens: int
) -> None:
    assert ids(run(tiny_engine(prefill_tokens=tokens))) == ids(expected)


@pytest.mark.parametrize("slots", [80, 110, 160])
@pytest.mark.parametrize("prefixes", [True, False])
def test_preempted_equals_not_preempted(
    tiny_engine: Make, expected: list[Completion], slots: int, prefixes: bool
) -> None:
    engine = tiny_engine(slots, prefix_cache=prefixes, prefill_tokens=16)
    found = run(engine)
    assert ids(found) == ids(expected)
    assert torch.allclose(
        torch.tensor([kl for c in found for kl in c.kl]),
        torch.tensor([kl for c in expected for kl in c.kl]),
        atol=1e-4,
    )
    assert engine.stats.preemptions > 0
    assert in_use(engine) == [0, 0]


def test_prefix_reuse_equals_none(tiny_engine: Make, expected: list[Completion]) -> None:
    engine = tiny_engine()
    assert ids(run(engine)) == ids(expected)
    before = engine.stats
    assert ids(run(engine)) == ids(expected)
    reused = engine.stats.prefix_hits - before.prefix_hits
    # All of every prompt but the token whose logits are asked for; guides need all of theirs.
    guided = [len(p) for p, r in zip(PROMPTS, RULES, strict=True) if r is not None]
    assert reused == sum(len(p) - 1 for p in PROMPTS) + sum(guided)
    assert in_use(engine) == [0, 0]
    assert all(cache.cached > 0 for cache in engine.stats.caches.values())
    engine.clear_prefixes()
    assert [cache.cached for cache in engine.stats.caches.values()] == [0, 0]
    longer = [*PROMPTS[0], *expected[0].token_ids[:11]]
    before = engine.stats
    run(engine)
    engine.generate([longer], VAS(1.0, 5), sampling=SAMPLINGS[0])
    caches, earlier = engine.stats.caches["model"], before.caches["model"]
    assert caches.reused - earlier.reused == len(longer) - 1  # a response is a prefix, too


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_slots_that_were_not_written_are_not_read(
    tiny_engine: Make,
    expected: list[Completion],
    monkeypatch: pytest.MonkeyPatch,
    impl: str,
) -> None:
    engine = tiny_engine(300)
    if impl == "reference":
        attend = kernels.tree_attention
        monkeypatch.setattr(
            kernels, "tree_attention", lambda *a, **k: attend(*a, **k, impl="reference")
        )
    for pool in engine.loop.caches.pools:
        for layer in range(2):
            for tensor in pool.layer(layer):
                with torch.inference_mode():
                    tensor.fill_(math.nan)
    assert ids(run(engine)) == ids(expected)


def test_the_story_model_and_its_guides_share_prefixes(
    stories: str, lora_guide: str, full_guide: str
) -> None:
    guides = {
        "a": ValueGuide(lora_guide),  # on the policy's weights, and in its cache
        "b": ValueGuide(full_guide),
        "f": FunctionGuide(lambda text: len(text) % 7),
    }
    engine = Engine(stories, guides=guides, dtype="float32")
    alone = Engine(stories, guides=guides, dtype="float32", prefix_cache=False)
    sampling = SamplingParams(temperature=0.8, max_tokens=6, seed=3, n=2)
    start = "Once upon a time, there was a little dog named Max. Max loved to"
    prompts = [start, start + " run", start + " eat. One day"]
    found = [engine.generate(p, VAS(2.0), sampling=sampling) for p in prompts]
    assert [ids(f) for f in found] == [
        ids(alone.generate(p, VAS(2.0), sampling=sampling)) for p in prompts
    ]
    length = len(engine.tokenizer(start)["input_ids"])
    assert engine.stats.caches["model"].reused >= 2 * (length - 1) + 2 * length
    assert engine.stats.caches["guide 'b'"].reused >= 2 * length
    assert alone.stats.prefix_hits == 0


def test_a_long_prompt_does_not_stall_what_runs(tiny_engine: Make) -> None:
    engine = tiny_engine(prefill_tokens=8)
    loop = engine.loop
    runs = engine.request(
        [1, 2], None, None, SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    )
    loop.add(runs)
    loop.step()
    long = engine.request([5] * 100, VAS(1.0, 4), None, SamplingParams(max_tokens=2, seed=2))
    loop.add(long)
    steps = 0
    while not long.samples:
        news = loop.step()
        steps += 1
        assert [event.request for event in news][:1] == [runs]
        assert engine.stats.filling == (0 if long.samples else 1)
    assert steps == math.ceil(100 / 8)
    loop.close()


def test_a_request_that_can_never_fit_fails_with_the_numbers(tiny_engine: Make) -> None:
    engine = tiny_engine(60)
    sampling = SamplingParams(max_tokens=20, seed=0, ignore_eos=True)
    found = engine.generate([[5] * 9, [5] * 41, [6] * 9], VAS(1.0, 4), None, sampling,
                            errors="return")  # fmt: skip
    assert [c.finish_reason for c in found] == ["length", "error", "length"]
    assert found[1].error == (
        "prompt 1: a sample needs 65 slots in the cache of the guide 'g' (41 prompt tokens, 20 new "
        "ones, and its candidates), and there are 60; allowed are a smaller max_tokens and a "
        "larger kv_memory"
    )
    exact = engine.generate([[5] * 36], VAS(1.0, 4), None, sampling)
    assert len(exact[0].token_ids) == 20  # 36 + 20 + 4 is all there is
    exact = engine.generate([[5] * 40], None, None, sampling)
    assert len(exact[0].token_ids) == 20


def test_cancelling_frees_slots_at_once(tiny_engine: Make) -> None:
    engine = tiny_engine(prefill_tokens=16)
    loop = engine.loop
    requests = [
        engine.request(p, r, None, s, i)
        for i, (p, r, s) in enumerate(zip(PROMPTS, RULES, SAMPLINGS, strict=True))
    ]
    for request in requests:
        loop.add(request)
    for steps, request in enumerate(requests):
        for _ in range(steps):
            loop.step()
        before = in_use(engine)
        held = bool(request.samples or request.filling)
        loop.cancel(request)
        assert not request.live
        assert (sum(in_use(engine)) < sum(before)) == held
    assert in_use(engine) == [0, 0]
    assert loop.idle
    assert loop.step() == []


def test_callers_take_turns_and_share_the_batch(tiny_engine: Make) -> None:
    """A stream that is read slowly runs on while another caller decodes."""
    engine = tiny_engine()
    alone = engine.generate([PROMPTS[0]], RULES[0], None, SAMPLINGS[0])[0]
    stream = engine.stream(PROMPTS[0], RULES[0], None, SAMPLINGS[0])
    pieces = [next(stream)]
    other = engine.generate([PROMPTS[2]], RULES[2], None, SAMPLINGS[2])
    assert ids(other) == ids(engine.generate([PROMPTS[2]], RULES[2], None, SAMPLINGS[2]))
    pieces += stream
    (ended,) = (p.completion for p in pieces if p.completion)
    assert ended.token_ids == alone.token_ids
    assert "".join(p.text for p in pieces) == alone.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_broken_step_of_one_caller_loses_nothing_of_another(
    tiny_engine: Make, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    engine = tiny_engine()
    alone = engine.generate([PROMPTS[0]], RULES[0], None, SAMPLINGS[0])[0]
    stream = engine.stream(PROMPTS[0], RULES[0], None, SAMPLINGS[0])
    pieces = [next(stream), next(stream)]
    append, calls = CachedSequence.append, []

    def broken(self: CachedSequence, *tokens: int) -> None:
        calls.append(1)
        if len(calls) == 8:  # some rows have gone on, some have not
            raise error("now")
        append(self, *tokens)

    with monkeypatch.context() as patch:
        patch.setattr(CachedSequence, "append", broken)
        with pytest.raises(error):
            engine.generate([PROMPTS[2]], RULES[2], None, SAMPLINGS[2])
    assert engine.stats.running == 0
    pieces += stream
    assert pieces[-1].completion is not None
    assert pieces[-1].completion.token_ids == alone.token_ids
    assert "".join(p.text for p in pieces) == alone.text
    assert in_use(engine) == [0, 0]


def test_a_fork_that_breaks_off_leaves_the_samples_that_wait_where_they_were(
    tiny_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    sampling = SamplingParams(max_tokens=4, seed=1, n=5, ignore_eos=True)
    expected = ids(engine.generate([[1, 2, 3]], VAS(1.0, 4), None, sampling))
    requests = [engine.request([i, 2, 3], VAS(1.0, 4), None, sampling) for i in (1, 4)]
    for request in requests:
        engine.loop.add(request)
    fork, calls = Row.fork, []

    def broken(self: Row, seed: int) -> Row:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no more")
        return fork(self, seed)

    monkeypatch.setattr(Row, "fork", broken)
    with pytest.raises(torch.OutOfMemoryError):
        engine.loop.step()
    while not engine.loop.idle:
        engine.loop.step()
    for request in requests:
        ended = [event.completion for event in request.news.values()]
        assert sorted(c.sample for c in ended) == list(range(5))
        assert {c.finish_reason for c in ended} == {"length"}
    ended = [event.completion for event in requests[0].news.values()]
    assert [c.token_ids for c in sorted(ended, key=lambda c: c.sample)] == expected
    assert in_use(engine) == [0, 0]


def test_ten_thousand_prompts_wait_outside(
    tiny_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(max_rows=4)
    built = []
    request = engine.request
    monkeypatch.setattr(engine, "request", lambda *a: built.append(1) or request(*a))
    prompts = [[i % 60 + 1] for i in range(10_000)]
    sampling = SamplingParams(max_tokens=3, seed=0, ignore_eos=True)
    outputs = engine.completions(prompts, None, None, sampling)
    assert [next(outputs).prompt for _ in range(8)] == list(range(8))
    assert len(built) <= 16
    assert engine.stats.waiting <= 4
    outputs.close()
    assert engine.loop.idle
    assert in_use(engine) == [0, 0]
