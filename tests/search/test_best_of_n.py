"""Best-of-N keeps the best response, and its estimators are those of the definition."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from typing import Any

import pytest

from fastguide import Engine, SamplingParams
from fastguide.rewards import FunctionReward, load_reward
from fastguide.search import BestOfN, best_of_n, expected_best, kl_of_best

PROMPTS = ["Once upon a time", "Tom had a red ball."]
SAMPLING = SamplingParams(temperature=0.9, max_tokens=12, seed=5)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("stories", guides={}, dtype="float32", device="cpu")


def test_the_best_is_kept(engine: Engine) -> None:
    reward = load_reward("cheerfulness")
    choices = sorted(
        best_of_n(engine, PROMPTS, BestOfN(reward, 8), sampling=SAMPLING), key=lambda c: c.prompt
    )
    assert [c.prompt for c in choices] == [0, 1]
    for choice in choices:
        assert [c.sample for c in choice.completions] == list(range(8))
        assert choice.reward == max(choice.rewards)  # type: ignore[type-var]
        assert choice.best is choice.completions[choice.rewards.index(choice.reward)]
    # The samples are those of a plain call.
    plain = engine.generate(PROMPTS, sampling=SamplingParams(0.9, 12, seed=5, n=8))
    assert [c.text for choice in choices for c in choice.completions] == [c.text for c in plain]


def test_one_is_what_the_policy_says(engine: Engine) -> None:
    (choice,) = best_of_n(engine, PROMPTS[:1], BestOfN(load_reward("length"), 1))
    assert choice.completions == [choice.best]


def test_what_cannot_be_judged_does_not_win(engine: Engine) -> None:
    texts: list[str] = []

    def picky(prompt: str, response: str) -> float:
        texts.append(response)
        if len(texts) % 9 == 1:
            raise RuntimeError
        return -len(response)

    search = BestOfN(FunctionReward(picky), 4)
    (choice,) = best_of_n(engine, PROMPTS[:1], search, sampling=SAMPLING)
    assert choice.best is not None
    nothing = BestOfN(FunctionReward(lambda prompt, response: float("nan")), 3)
    (choice,) = best_of_n(engine, PROMPTS[:1], nothing, sampling=SAMPLING)
    assert (choice.best, choice.reward, choice.rewards) == (None, None, [None] * 3)


def test_a_refused_prompt_harms_no_other(engine: Engine) -> None:
    long = "word " * 3000
    search = BestOfN(load_reward("vader"), 3)
    refused, fine = sorted(
        best_of_n(engine, [long, PROMPTS[0]], search, sampling=SAMPLING), key=lambda c: c.prompt
    )
    assert refused.best is None
    assert "context" in str(refused.completions[0].error)
    assert len(fine.completions) == 3


def test_wrong_numbers_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="n is 0; allowed are whole numbers from 1"):
        BestOfN(load_reward("vader"), 0)
    greedy = SamplingParams(temperature=0)
    with pytest.raises(ValueError, match="temperature is 0, at which all responses are the same"):
        list(best_of_n(engine, PROMPTS, BestOfN(load_reward("vader"), 2), sampling=greedy))


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_expected_best_is_the_mean_over_all_subsets(n: int) -> None:
    rewards = [random.Random(i).gauss(0, 1) for i in range(7)]
    by_hand = statistics.fmean(max(subset) for subset in itertools.combinations(rewards, n))
    assert expected_best(rewards, n) == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="allowed are 1 to 7"):
        expected_best(rewards, 8)


def test_the_kl_is_that_of_the_maximum_of_uniforms() -> None:
    # The reward's rank is uniform; that of the best of n has the density n u^(n - 1).
    for n in (1, 4, 128):
        grid = [(i + 0.5) / 200_000 for i in range(200_000)]
        density = [n * u ** (n - 1) for u in grid]
        integral = math.fsum(d * math.log(d) for d in density if d > 0) / len(grid)
        assert kl_of_best(n) == pytest.approx(integral, abs=1e-4)


def test_an_interrupt_loses_no_prompt_that_had_begun(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = [], engine.runner.step

    def counted(rows: Any) -> Any:
        steps.append(len(rows))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(rows)

    monkeypatch.setattr(engine.runner, "step", counted)
    search = BestOfN(load_reward("length"), n=2)
    sampling = SamplingParams(max_tokens=8, seed=0)
    choices = best_of_n(engine, ["Once", "The dog"], search, sampling=sampling)
    found = [next(choices), next(choices)]
    with pytest.raises(KeyboardInterrupt):
        next(choices)
    assert sorted(choice.prompt for choice in found) == [0, 1]
    assert all(len(choice.best.token_ids) == 3 for choice in found)
