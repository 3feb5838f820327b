"""Adaptive candidates: no more are scored than hold a share of the base distribution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastguide import ARGS, FUDGE, VAS, Completion, Engine, FunctionGuide, SamplingParams
from fastguide.config import Rule
from fastguide.engine.sampler import Candidates, RowBatch

PROMPT = list(range(1, 12))


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.7, "max_tokens": 40, "seed": 3} | changes))  # type: ignore[arg-type]


def ids(outputs: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in outputs]


@pytest.fixture(scope="module")
def engine(tiny_engine: Callable[..., Engine]) -> Engine:
    return tiny_engine()


def test_the_smallest_set_that_holds_the_mass() -> None:
    shares = torch.tensor([[0.5, 0.25, 0.125, 0.0625], [0.9, 0.05, 0.03, 0.02]])
    rule = [VAS(k=3, candidate_mass=m).lower(1.0) for m in (0.74, 0.5)]
    found = Candidates(shares.log(), torch.arange(4).expand(2, 4), torch.zeros(2).double())
    for masses, counts in (((0.74, 0.5), (2, 1)), ((0.76, 0.91), (3, 2)), ((1.0, 1.0), (3, 3))):
        rows = [r._replace(mass=m) for r, m in zip(rule, masses, strict=True)]
        batch = RowBatch.build(rows, [0, 1], [{}, {}], [], torch.device("cpu"))
        assert batch.narrowed(found).count.tolist() == list(counts)


@pytest.mark.parametrize("rule", [VAS(3.0, 12), ARGS(2.0, 6), FUDGE(2.0, 9)], ids=repr)
def test_the_whole_mass_scores_all(engine: Engine, rule: Rule) -> None:
    kind = {"candidate_mass": 1.0}
    same = type(rule)(**(vars(rule) | kind))
    outputs = engine.generate(PROMPT, same, sampling=params(n=2))
    assert ids(outputs) == ids(engine.generate(PROMPT, rule, sampling=params(n=2)))
    assert all(set(c.scored) == {rule.k} for c in outputs)


def test_one_candidate_is_the_base_model_and_asks_no_guide(
    tiny_engine: Callable[..., Engine],
) -> None:
    asked: list[str] = []

    def judge(text: str) -> float:
        asked.append(text)
        return float(len(text))

    engine = tiny_engine(guides={"f": FunctionGuide(judge)})
    rule, weights = VAS(5.0, 20, candidate_mass=1e-9), {"f": 1.0, "g": 1.0}
    guided = engine.generate(PROMPT, rule, weights, params(n=2))
    assert ids(guided) == ids(engine.generate(PROMPT, sampling=params(n=2)))
    assert not asked
    assert all(c.scored == [0] * len(c.token_ids) for c in guided)
    assert all(c.scores == [None] * len(c.token_ids) for c in guided)
    assert all(abs(kl) < 1e-6 for c in guided for kl in c.kl)


def test_without_fill_a_single_candidate_is_scored(engine: Engine) -> None:
    (found,) = engine.generate(
        PROMPT, VAS(5.0, 20, "none", candidate_mass=1e-9), sampling=params(max_tokens=8)
    )
    assert found.scored == [1] * len(found.token_ids)


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.8])
def test_neighbours_change_nothing_and_late_guides_catch_up(engine: Engine, mass: float) -> None:
    """Rows that skip steps, beside rows that do not; the guide reads what it has missed."""
    rules = [VAS(8.0, 16, candidate_mass=mass), VAS(8.0, 16), ARGS(3.0, 8, candidate_mass=mass)]
    prompts = [PROMPT, PROMPT[:3], PROMPT[:7]]
    together = engine.generate(prompts, rules, sampling=params(ignore_eos=True))
    for prompt, rule, found in zip(prompts, rules, together, strict=True):
        (alone,) = engine.generate([prompt], rule, sampling=params(ignore_eos=True))
        assert alone.token_ids == found.token_ids
        assert alone.scored == found.scored
        scores = [s for s in alone.scores if s is not None]
        assert scores == pytest.approx([s for s in found.scores if s is not None], abs=1e-5)
    assert max(together[0].scored) <= 16


@pytest.mark.parametrize("mass", [0, -0.5, 1.5, float("nan"), "all", True])
def test_a_mass_that_is_none_is_refused(mass: object) -> None:
    for rule in (VAS, ARGS, FUDGE):
        with pytest.raises(ValueError, match=r"candidate_mass is .*; allowed are numbers above 0"):
            rule(candidate_mass=mass)
