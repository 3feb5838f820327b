"""Steps of fixed shapes give what steps laid out on the host give.

On a CPU the program runs as it comes; on a GPU the same list of kernels is a graph (test_gpu.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crowds import Shape, crowd
from transformers import LlamaConfig, LlamaModel

from fastguide import (
    ARGS,
    FUDGE,
    VAS,
    Completion,
    Engine,
    FunctionGuide,
    SamplingParams,
    ValueGuide,
)
from fastguide.engine.program import FAILED, LANES, WIDTHS
from fastguide.guides import LoadContext
from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder
from fastguide.scorer import TreeScorer

pytestmark = pytest.mark.filterwarnings(f"error:{FAILED}")  # no step may hide behind the host's

Make = Callable[..., Engine]
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    bos_token_id=None,
)
PROMPTS = [
    "Once upon a time, there was a little dog named Max.",
    "One day",
    "The sun was hot. Lily went to the beach.",
    "Tom",
    "It was",
]
RULES = [
    VAS(8.0, 12),
    ARGS(4.0, 6),
    VAS(8.0, 12, candidate_mass=0.7),
    None,
    VAS(-4.0, 5, "drop"),
]
WEIGHTS = [
    {"lora": 1.0},
    {"full": 1.0, "lora": -0.5},
    {"brief": 1.0, "lora": 1.0, "head": 0.5},
    None,
    {"head": 1.0},
]


@pytest.fixture(scope="module", params=["two-phase", "one-pass", "auto"])
def engines(
    request: pytest.FixtureRequest, lora_guide: str, full_guide: str, head_guide: str
) -> tuple[Engine, Engine]:
    """One that lays its steps out on the host, and one whose steps are of fixed shapes."""
    guides = {"lora": ValueGuide(lora_guide), "full": ValueGuide(full_guide)}
    guides |= {"brief": ValueGuide("brief"), "head": ValueGuide(head_guide)}
    return tuple(  # type: ignore[return-value]
        Engine("stories", guides, dtype="float32", device="cpu", way=request.param, graphs=fixed)
        for fixed in (False, True)
    )


def same(found: list[Completion], expected: list[Completion]) -> None:
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.scored == theirs.scored
        assert [s is None for s in mine.scores] == [s is None for s in theirs.scores]
        for name in ("scores", "logprobs", "base_logprobs", "kl"):
            numbers = [[x for x in getattr(c, name) if x is not None] for c in (mine, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], abs=2e-4)


def in_use(engine: Engine) -> list[int]:
    return [cache.in_use for cache in engine.stats.caches.values()]


@pytest.mark.parametrize("temperature", [0.0, 0.9, 1.6])
def test_mixed_requests(engines: tuple[Engine, Engine], temperature: float) -> None:
    """Rows come and go, and draw from outside of their candidates; some are not guided."""
    samplings = [
        SamplingParams(temperature, 6 + 7 * i, seed=i, n=1 + i % 3) for i in range(len(PROMPTS))
    ]
    asked = (PROMPTS, RULES, WEIGHTS, samplings)
    expected, found = (engine.generate(*asked) for engine in engines)
    same(found, expected)
    programs = engines[1].runner._programs
    assert programs is not None
    assert programs._made
    if engines[1].runner.ways.way != "two-phase":
        assert any(program.leapers for program in programs._made.values())
    assert not any(in_use(engines[1]))


def test_programs_change_with_the_number_of_rows_and_candidates(
    engines: tuple[Engine, Engine],
) -> None:
    """A row goes on in another program, and with steps that no program is made for."""
    rules = [VAS(8.0, 3), VAS(8.0, 30), VAS(8.0, 250)]
    samplings = [SamplingParams(0.9, n, seed=n) for n in (40, 20, 9)]
    asked = (PROMPTS[:3], rules, {"full": 1.0, "lora": 1.0}, samplings)
    expected, found = (engine.generate(*asked) for engine in engines)
    same(found, expected)
    assert max(WIDTHS) < 250
    programs = engines[1].runner._programs
    assert programs is not None
    assert {(1, 10), (2, 50)} <= {key[:2] for key in programs._made}


def test_requests_that_join_and_prefixes_that_are_shared(engines: tuple[Engine, Engine]) -> None:
    found = []
    for engine in engines:
        sampling = SamplingParams(0.8, 30, seed=3, n=2)
        requests = [
            engine.request(prompt, VAS(6.0, 10), {"lora": 1.0, "full": 1.0}, sampling, i)
            for i, prompt in enumerate([PROMPTS[0], PROMPTS[0] + " Max", PROMPTS[2]])
        ]
        for request in requests:
            engine.loop.add(request)
            for _ in range(7):
                engine.loop.step()
        engine.loop.cancel(requests[2])
        while not engine.loop.idle:
            engine.loop.step()
        done = [event.completion for r in requests[:2] for event in r.news.values()]
        found.append(sorted(done, key=lambda c: (c.prompt, c.sample)))
        assert not any(in_use(engine))
    same(found[1], found[0])


class Well:
    """A head on the tiny model's own states."""

    def load(self, context: LoadContext) -> TreeScorer:
        assert context.policy is not None
        return TreeScorer(context.policy, lambda hidden: hidden[:, 0])


@pytest.mark.parametrize("weights", [{"g": 1.0}, {"head": 1.0}], ids=str)
def test_the_next_step_is_on_its_way(tiny_engine: Make, weights: dict[str, float]) -> None:
    """Who comes meanwhile has its first token a step later; what was begun for who left is lost."""
    engine = tiny_engine(guides={"head": Well()}, max_rows=2, graphs=True)
    sampling = SamplingParams(0.9, 9, seed=1, ignore_eos=True)
    first, second = (engine.request(p, VAS(2.0, 3), weights, sampling) for p in ([1, 2], [3, 4]))
    engine.loop.add(first)
    assert [e.request for e in engine.loop.step()] == [first]
    programs = engine.runner._programs
    assert programs is not None
    assert programs._active is not None
    (row,) = programs._active.rows
    assert row is not None
    assert programs._active._flight is not None
    assert list(programs._active._flight.lanes) == [row]
    engine.loop.add(second)
    while not engine.loop.idle:
        engine.loop.step()
    assert len(row.sequence) == 0  # closed
    assert not any(in_use(engine))


@pytest.mark.parametrize("prefixes", [True, False])
@pytest.mark.parametrize("way", ["one-pass", "two-phase"])
def test_a_crowd_in_a_short_pool(tiny_engine: Make, way: str, prefixes: bool) -> None:
    """Candidates that the policy reads take slots, too."""
    weights = (None, {"g": 1.0}, {"head": 1.0})
    shape = Shape(vocabulary=60, shared=30, own=39, new=49, weights=weights)
    engine = tiny_engine(
        260,
        guides={"head": Well()},
        prefix_cache=prefixes,
        prefill_tokens=32,
        max_rows=16,
        way=way,
        graphs=True,
    )
    outcome = crowd(engine, 120, 1, shape)
    assert outcome.cancelled
    assert not outcome.errors
    assert engine.stats.preemptions > 0


class Ill:
    """A guide on the tiny model's weights that gives NaN where a token of a row says so."""

    def load(self, context: LoadContext) -> TreeScorer:
        assert context.policy is not None

        def head(hidden: Any) -> Any:
            scores = hidden[:, 0] * 0
            return scores.masked_fill(hidden[:, 1] > 1.5, math.nan)

        return TreeScorer(context.policy, head)


def test_a_row_that_fails_fails_alone(tiny_engine: Make) -> None:
    fixed, usual = (
        tiny_engine(guides={"ill": Ill()}, graphs=g, way="two-phase") for g in (True, False)
    )
    prompts = [[i % 60 + 1, (7 * i) % 60 + 1] for i in range(12)]
    weights = [{"ill": 1.0} if i % 2 else {"g": 1.0} for i in range(12)]
    sampling = SamplingParams(0.9, 30, seed=5, ignore_eos=True)
    found, expected = (
        engine.generate(prompts, VAS(3.0, 6), weights, sampling, errors="return")
        for engine in (fixed, usual)
    )
    assert any(c.error for c in expected)
    assert any(not c.error for c in expected)
    assert [c.error for c in found] == [c.error for c in expected]
    same(found, expected)
    assert in_use(fixed) == [0, 0]


def test_functions_take_the_other_way(tiny_engine: Make) -> None:
    engine = tiny_engine(guides={"f": FunctionGuide(lambda t: 0.0, on="tokens")}, graphs=True)
    assert engine.runner._programs is None
    engine.generate([[1, 2]], FUDGE(), {"f": 1.0}, SamplingParams(max_tokens=2))


def test_more_rows_than_any_program_has(tiny_engine: Make) -> None:
    """They are laid out on the host, and go on in a program when enough have ended."""
    prompts = [[i % 50 + 1, i % 7 + 1] for i in range(max(LANES) + 9)]
    samplings = [
        SamplingParams(0.9, 2 + i % 4, seed=i, ignore_eos=True) for i in range(len(prompts))
    ]
    found, expected = (
        tiny_engine(9000, max_rows=300, graphs=graphs).generate(
            prompts, VAS(2.0, 4), {"g": 1.0}, samplings, progress=False
        )
        for graphs in (True, False)
    )
    same(found, expected)


class Smaller:
    """A guide that knows fewer tokens and positions than the policy."""

    def load(self, context: LoadContext) -> TreeScorer:
        torch.manual_seed(6)
        sizes = SIZES | {"vocab_size": 40, "max_position_embeddings": 24, "eos_token_id": None}
        model = LlamaModel(LlamaConfig(**sizes, attn_implementation=NAME))
        return TreeScorer(Decoder(model, 24), torch.nn.Linear(SIZES["hidden_size"], 1))


def test_a_guide_that_knows_less_than_the_policy(tiny_engine: Make) -> None:
    """Others' tokens and positions do not reach it; a candidate that it does not know fails."""
    prompts = [[1, 2], [60, 61] * 20, [3, 4]]
    weights = [{"small": 1.0}, {"g": 1.0}, {"g": 1.0}]
    sampling = SamplingParams(0.9, 15, seed=2, ignore_eos=True)
    found, expected = (
        tiny_engine(guides={"small": Smaller()}, graphs=graphs, way="two-phase").generate(
            prompts, VAS(2.0, 3), weights, sampling, errors="return"
        )
        for graphs in (True, False)
    )
    assert [c.token_ids for c in found[1:]] == [c.token_ids for c in expected[1:]]
    assert all(c.error is None and len(c.token_ids) == 15 for c in found[1:])
    assert (found[0].error is None) == (expected[0].error is None)
    assert found[0].token_ids == expected[0].token_ids


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("way", ["one-pass", "two-phase"])
def test_a_guide_that_raises_fails_its_rows_alone(
    tiny_engine: Make, way: str, graphs: bool
) -> None:
    class Raising(Ill):
        def load(self, context: LoadContext) -> TreeScorer:
            assert context.policy is not None

            def head(hidden: torch.Tensor) -> torch.Tensor:
                raise ZeroDivisionError("no score")

            return TreeScorer(context.policy, head)

    engine = tiny_engine(guides={"bad": Raising()}, graphs=graphs, way=way)
    prompts, weights = [[1, 2], [3, 4], [5, 6]], [{"bad": 1.0}, {"g": 1.0}, None]
    rules = [VAS(2.0), VAS(2.0), None]
    sampling = SamplingParams(0.9, 6, seed=1, ignore_eos=True)
    with pytest.warns(UserWarning, match=FAILED) if graphs else contextlib.nullcontext():
        bad, good, plain = engine.generate(prompts, rules, weights, sampling, errors="return")
    assert bad.error is not None
    assert "guide 'bad' failed" in bad.error
    assert len(good.token_ids) == len(plain.token_ids) == 6
    assert in_use(engine) == [0, 0]


def test_lanes_that_nobody_is_in_stay_as_they_are(tiny_engine: Make) -> None:
    """However many steps the others make; in three lanes of four more than the context is long."""
    engine = tiny_engine(guides={"head": Well()}, max_rows=3, graphs=True)
    prompts = [[i + 1, 2 * i + 1] for i in range(12)]
    weights = [{"head": 1.0} if i % 2 else {"g": 1.0} for i in range(12)]
    sampling = SamplingParams(0.9, 120, seed=4, ignore_eos=True)
    done = engine.generate(prompts, VAS(2.0, 3), weights, sampling, progress=False)
    assert all(len(c.token_ids) == 120 for c in done)
    assert engine.runner._programs is not None
    programs = [p for p in engine.runner._programs._made.values() if p.lanes == 4]
    assert programs
    assert all(p.fixed.length[3] == 1 for p in programs)


class Broken:
    """A guide with a cache of its own, which is NaN wherever token 62 is."""

    def load(self, context: LoadContext) -> TreeScorer:
        torch.manual_seed(8)
        config = LlamaConfig(**SIZES, eos_token_id=None, attn_implementation=NAME)
        model = LlamaModel(config)
        with torch.no_grad():
            model.embed_tokens.weight[62] = math.nan
        return TreeScorer(Decoder(model, 256), torch.nn.Linear(SIZES["hidden_size"], 1))


@pytest.mark.parametrize("slots", [70, 4000])
def test_a_row_of_nan_does_not_reach_others_through_slots_of_nobody(
    tiny_engine: Make, slots: int
) -> None:
    """Candidates past a row's own are read and written, too; here 7 of 10 in a short pool."""
    prompts, sampling = [[3, 4], [1, 62]], SamplingParams(0.9, 8, seed=3, ignore_eos=True)
    found, expected = (
        tiny_engine(slots, guides={"broken": Broken()}, graphs=graphs, way="two-phase").generate(
            prompts, VAS(2.0, 3), {"broken": 1.0}, sampling, errors="return"
        )
        for graphs in (True, False)
    )
    assert expected[0].error is None
    assert expected[1].error is not None
    assert [c.error for c in found] == [c.error for c in expected]
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_more_candidates_than_the_vocabulary_has(tiny_engine: Make) -> None:
    found, expected = (
        tiny_engine(graphs=graphs).generate(
            [[1, 2], [5]], VAS(2.0, 60), {"g": 1.0}, SamplingParams(0.9, 9, seed=3, ignore_eos=True)
        )
        for graphs in (True, False)
    )
    same(found, expected)


def test_rows_leap_only_where_that_pays(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head's rows leap in any case, beside those of a LoRA that do not."""
    engine = engines[1]
    if engine.runner.ways.way != "auto":
        pytest.skip("the engine is told which way to go")
    for pays in (True, False):
        monkeypatch.setattr(engine.runner.ways, "_pays", lambda *_, pays=pays: pays)
        asked = (PROMPTS[:2], VAS(4.0, 10), [{"head": 1.0}, {"lora": 1.0}])
        engine.generate(*asked, SamplingParams(0.9, 5, seed=1, ignore_eos=True))
        assert engine.runner._programs is not None
        last = list(engine.runner._programs._made.values())[-1]
        assert last.leapers == ({"head", "lora"} if pays else {"head"})


def test_what_graphs_cannot_be_had_with() -> None:
    with pytest.raises(ValueError, match="graphs is True with way 'overlap'"):
        Engine(graphs=True, way="overlap")
