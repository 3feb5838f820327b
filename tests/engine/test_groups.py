"""Many samples of one prompt: as many at once as there is room for, and the same draws."""

from __future__ import annotations

from typing import Any

import pytest

from fastguide import VAS, Completion, Engine, FunctionGuide, SamplingParams, ValueGuide
from fastguide.guides import LoadContext
from fastguide.guides.function import FunctionScorer, TokenState

PROMPTS = ["Once upon a time, there was a dog.", "One day"]


@pytest.fixture(scope="module")
def engine(stories: str, lora_guide: str) -> Engine:
    return Engine(stories, guides={"g": ValueGuide(lora_guide)}, dtype="float32", max_rows=4)


@pytest.fixture
def steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step has."""
    sizes: list[int] = []
    step = engine.runner.step

    def counted(rows: Any) -> Any:
        sizes.append(len(rows))
        return step(rows)

    monkeypatch.setattr(engine.runner, "step", counted)
    return sizes


def ids(outputs: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in outputs]


def in_use(engine: Engine) -> list[int]:
    decoders = [engine.runner.policy, engine.runner.scorers["g"].decoder]  # type: ignore[attr-defined]
    return [decoder.pool.slots.in_use for decoder in decoders]


def test_rows_never_exceed_their_limit_and_draws_stay(engine: Engine, steps: list[int]) -> None:
    settings = dict(temperature=0.8, seed=3)
    sampling = [SamplingParams(n=10, max_tokens=8, **settings),
                SamplingParams(n=3, max_tokens=5, **settings)]  # fmt: skip
    found = engine.generate(PROMPTS, VAS(3.0), sampling=sampling)
    assert max(steps) == 4
    assert [(c.prompt, c.sample) for c in found] == [(0, i) for i in range(10)] + [
        (1, i) for i in range(3)
    ]
    assert in_use(engine) == [0, 0]
    engine.max_rows = 64
    try:
        together = engine.generate(PROMPTS, VAS(3.0), sampling=sampling)
    finally:
        engine.max_rows = 4
    assert ids(found) == ids(together)
    assert [c.seed for c in found] == [c.seed for c in together]
    assert max(steps) == 13


def test_a_prompt_is_prefilled_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    runner_open = engine.runner.open

    def counted(prompts: Any) -> Any:
        opened.append(len(prompts))
        return runner_open(prompts)

    monkeypatch.setattr(engine.runner, "open", counted)
    engine.generate(PROMPTS, VAS(1.0), sampling=SamplingParams(n=9, max_tokens=2, seed=0))
    assert sum(opened) == 2


def test_a_huge_number_starts_at_once_and_is_refused_beyond_its_limit(engine: Engine) -> None:
    stream = engine.completions("One day", sampling=SamplingParams(n=100_000, max_tokens=2, seed=0))
    assert next(stream).finish_reason == "length"
    stream.close()
    assert in_use(engine) == [0, 0]
    with pytest.raises(ValueError, match="n is 100001; allowed are whole numbers from 1 to 100000"):
        SamplingParams(n=100_001)


@pytest.mark.parametrize("when", ["first", "between"])
def test_an_interrupt_gives_back_what_waits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    step, calls = engine.runner.step, []

    def interrupted(rows: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if when == "first" else 7):
            raise KeyboardInterrupt
        return step(rows)

    monkeypatch.setattr(engine.runner, "step", interrupted)
    done: list[Completion] = []
    sampling = SamplingParams(n=20, max_tokens=4, seed=0, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        done.extend(engine.completions("One day", VAS(1.0), sampling=sampling))
    reasons = [c.finish_reason for c in done]
    assert reasons.count("aborted") == 4
    assert reasons.count("length") == (0 if when == "first" else 4)
    assert in_use(engine) == [0, 0]


def test_a_guide_that_cannot_be_forked_any_more_stops_its_prompt_only(stories: str) -> None:
    forks = []

    class State(TokenState):
        def fork(self) -> State:
            forks.append(1)
            if len(forks) > 3:
                raise RuntimeError("no more forks")
            return State(self.tokens)

    class Guide:
        def load(self, context: LoadContext) -> FunctionScorer:
            class Scorer(FunctionScorer):
                def open(self, tokens: Any) -> State:
                    return State(tokens)

            return Scorer(FunctionGuide(len), context.tokenizer, context.device)

    engine = Engine(stories, guides={"g": Guide()}, max_rows=2)
    sampling = [SamplingParams(n=n, max_tokens=3, seed=0, ignore_eos=True) for n in (6, 1)]
    found = engine.generate(PROMPTS, VAS(1.0), sampling=sampling, errors="return")
    assert [(c.prompt, c.sample, c.finish_reason) for c in found] == [
        (0, 0, "length"),
        (0, 1, "length"),
        (0, 2, "length"),
        (0, 3, "error"),
        (1, 0, "length"),
    ]
    assert found[3].error == "prompt 0: RuntimeError: no more forks"
    assert found[3].prompt_tokens == 0
    assert engine.runner.policy.pool.slots.in_use == 0
