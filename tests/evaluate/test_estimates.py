"""Estimates of points, best-of-N among them, against what they mean."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from typing import Any

import pytest
import torch

from fastguide.evaluate import estimates
from fastguide.rewards import WeightedSum, load_reward
from fastguide.search import kl_of_best


def rows(rewards: dict[int, list[float | None]], **more: Any) -> list[dict[str, Any]]:
    """Responses with these rewards by prompt; their ``length`` tells them apart."""
    found = [
        {"prompt": p, "sample": s, "reward": r, "length": 10.0 * p + s, "log_ratio": 0.5 * s}
        for p, group in rewards.items()
        for s, r in enumerate(group)
    ]
    return [row | more for row in found]


REWARDS = {0: [0.3, 0.9, 0.1, 0.7], 1: [2.0, -1.0, 0.0, 5.0]}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["reward", "length"])
def test_best_of_n_is_the_mean_over_all_choices_of_n(n: int, name: str) -> None:
    found = estimates.mean(estimates.shares(rows(REWARDS), n), name)
    every = []
    for prompt in REWARDS:
        group = [row for row in rows(REWARDS) if row["prompt"] == prompt]
        best = [max(c, key=lambda r: r["reward"]) for c in itertools.combinations(group, n)]
        every.append(statistics.fmean(row[name] for row in best))
    assert found.mean == pytest.approx(statistics.fmean(every))
    assert found.responses == 8


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_win_rates_of_best_of_n_are_those_of_drawn_winners(ours: int, theirs: int) -> None:
    other = {0: [0.2, 0.8, 0.3], 1: [1.0, 2.0, 6.0]}
    one, two = rows(REWARDS), rows(other)
    found = estimates.wins(estimates.shares(one, ours), estimates.shares(two, theirs))
    expected = []
    for prompt in REWARDS:
        groups = [[r["reward"] for r in x if r["prompt"] == prompt] for x in (one, two)]
        pairs = itertools.product(
            map(max, itertools.combinations(groups[0], ours)),
            map(max, itertools.combinations(groups[1], theirs)),
        )
        expected.append(statistics.fmean((a > b) + 0.5 * (a == b) for a, b in pairs))
    assert found.mean == pytest.approx(statistics.fmean(expected))


def test_the_kl_of_winners_adds_what_their_policy_differs_by() -> None:
    """Of three symbols, exactly: 'the best of two of q' against p."""
    p, q, reward = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [1.0, 3.0, 2.0]
    rng = random.Random(0)
    ratio = [math.log(b / a) for a, b in zip(p, q, strict=True)]
    drawn = [
        {"prompt": i, "sample": s, "reward": reward[x] + 1e-9 * s, "log_ratio": ratio[x]}
        for i in range(4000)
        for s, x in enumerate(rng.choices(range(3), q, k=2))
    ]
    found = estimates.kl(estimates.shares(drawn, 2), 2)
    pairs = itertools.product(range(3), repeat=2)
    winners = [(q[a] * q[b], max((a, b), key=reward.__getitem__)) for a, b in pairs]
    expected = kl_of_best(2) + sum(share * ratio[x] for share, x in winners)
    assert found.mean == pytest.approx(expected, abs=2 * found.ci95)
    assert found.ci95 < 0.1


def test_responses_without_a_reward_do_not_count() -> None:
    some = {0: [None, 0.5], 1: [None, None]}
    found = estimates.shares(rows(some), 2)
    assert list(found) == [0]
    assert estimates.mean(found, "reward").mean == 0.5
    assert estimates.answers(rows(some), 2)[0]["sample"] == 1


def test_answers_are_the_best_of_the_first_responses() -> None:
    for n, expected in ((1, [0, 0]), (2, [1, 0]), (4, [1, 3])):
        found = estimates.answers(rows(REWARDS), n)
        assert [found[p]["sample"] for p in (0, 1)] == expected


def test_costs_count_what_competes_and_who_judges() -> None:
    counts = dict(tokens=10, prompt_tokens=4, scored=200)
    one = rows({0: [1.0]}, **counts, seconds=2.0, judge_seconds=0.5)
    plain = dict(estimates.costs(one, 1, policy=100, guides=[], reward=7))
    assert (plain["policy_flops"], plain["guide_flops"], plain["judge_flops"]) == (2800, 0, 0)
    assert (plain["seconds_per_response"], plain["tokens_per_second"]) == (2.0, 5.0)
    best = dict(estimates.costs(one, 8, policy=100, guides=[], reward=7))
    assert (best["policy_flops"], best["judge_flops"]) == (200 * 84, 14 * 8 * 14)
    assert best["seconds_per_response"] == 8 * 2.5
    guided = dict(estimates.costs(one, 1, policy=100, guides=[30, 40], reward=7))
    assert guided["guide_flops"] == 2 * 70 * (4 + 20 * 10)


def test_a_missing_number_leaves_out_its_response_alone() -> None:
    some = rows({0: [0.1, 0.2], 1: [0.3, 0.4]})
    some[0]["length"] = None
    found = estimates.mean(estimates.shares(some, 1), "length")
    assert (found.mean, found.responses) == ((1.0 + 10.5) / 2, 3)


def test_sums_ask_all_their_classifiers() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 1)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.words

    class Classifier:
        name, per_token, model = "classifier", 0.0, Model()

    reward: Any = Classifier()
    assert estimates.reward_weights(WeightedSum(((1.0, reward), (0.5, reward)))) == 2 * 5
    assert estimates.reward_weights(load_reward("length")) == 0
