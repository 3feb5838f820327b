"""Rewards of responses and their scale."""

from __future__ import annotations

import pytest
import torch

from fastguide.kernels.reference import td_lambda
from fastguide.models.value import RewardScale
from fastguide.train.episodes import Rollout, collate, label
from fastguide.train.rewards import brevity, cheerfulness, scale_of, sentences, standardise


def test_sentences_keep_closing_quotes_and_the_cut_off_end() -> None:
    text = '"Hello!" said Tom. They ran? Yes.\nThe dog and the'
    assert sentences(text) == ['"Hello!"', "said Tom.", "They ran?", "Yes.", "The dog and the"]
    assert sentences("  \n ") == []


def test_cheerfulness_is_the_mean_over_sentences() -> None:
    good, bad = "She was happy and loved it.", "He was sad and cried."
    assert cheerfulness(good) > 0.5 > -0.5 > cheerfulness(bad)
    both = cheerfulness(f"{good} {bad}")
    assert both == pytest.approx((cheerfulness(good) + cheerfulness(bad)) / 2)
    # It does not saturate: a long cheerful text is no more cheerful than one of its sentences.
    assert cheerfulness(" ".join([good] * 30)) == pytest.approx(cheerfulness(good))
    assert cheerfulness("") == 0.0


def test_brevity_counts_tokens() -> None:
    assert brevity("whatever", [1, 2, 3]) == -3.0


def test_scale_and_standardise() -> None:
    scale = scale_of("r", [1.0, 3.0])
    assert scale == RewardScale("r", mean=2.0, std=1.0)
    assert standardise([1.0, 4.0], scale) == [-1.0, 2.0]
    with pytest.raises(ValueError, match="'r' must vary"):
        scale_of("r", [1.0, 1.0])


def test_label_cuts_responses_first() -> None:
    rollouts = [
        Rollout(0, 0, (1, 2), (3, 4, 5, 6), "length"),
        Rollout(1, 0, (1,), (3, 0), "stop"),
    ]
    episodes, scale = label(rollouts, "brevity", decode=str, max_tokens=3)
    assert [len(e.response_ids) for e in episodes] == [3, 2]
    assert (scale.mean, scale.std, scale.per_token) == (-2.5, 0.5, True)
    # Paid per token, 1 / std each; what is still to come is 0 in the mean over all states.
    assert [e.token_reward for e in episodes] == [-2.0, -2.0]
    batch = collate(episodes)
    left = td_lambda(torch.zeros(2, 5), batch.rewards, batch.states, 1.0, 1.0)
    assert left.sum().item() == pytest.approx(0.0, abs=1e-5)
    assert left[0, 1].item() - left[1, 0].item() == pytest.approx(-2.0)  # 3 tokens, not 2
    glad = {(3, 4, 5): "Good.", (3, 0): "Bad."}
    episodes, _ = label(rollouts, "cheerfulness", glad.__getitem__, max_tokens=3)
    assert [(e.reward, e.token_reward) for e in episodes] == [(1.0, 0.0), (-1.0, 0.0)]
    with pytest.raises(ValueError, match="unknown reward 'joy'; there are brevity, cheerfulness"):
        label(rollouts, "joy", decode=str)
