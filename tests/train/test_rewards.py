"""Rewards of responses and their scale."""

from __future__ import annotations

import pytest

from fastguide.models.value import RewardScale
from fastguide.train.episodes import Rollout, label
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
    assert (scale.mean, scale.std) == (-2.5, 0.5)
    assert [e.reward for e in episodes] == [-1.0, 1.0]
    with pytest.raises(ValueError, match="unknown reward 'joy'; there are brevity, cheerfulness"):
        label(rollouts, "joy", decode=str)
