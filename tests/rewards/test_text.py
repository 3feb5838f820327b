"""Rewards that read texts, and how they are named and judged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastguide.models.value import RewardScale
from fastguide.rewards import (
    CheckerReward,
    Failure,
    FunctionReward,
    PatternReward,
    Sample,
    WeightedSum,
    cheerfulness,
    judge,
    load_reward,
    sentences,
    vader,
)


def samples(*responses: str) -> list[Sample]:
    return [Sample("Q: ", response, len(response.split())) for response in responses]


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
    assert vader(" ".join([good] * 30)) > cheerfulness(good)
    assert cheerfulness("") == 0.0


def test_scales() -> None:
    scale = RewardScale.of("r", [1.0, 3.0])
    assert scale == RewardScale("r", mean=2.0, std=1.0)
    assert scale.standardise([1.0, 4.0]) == [-1.0, 2.0]
    with pytest.raises(ValueError, match="'r' is 1 for all 2 responses"):
        RewardScale.of("r", [1.0, 1.0])


def test_lengths_are_paid_per_token() -> None:
    assert load_reward("length")(samples("a b c")) == [3.0]
    assert load_reward("brevity")(samples("a b c")) == [-3.0]
    assert load_reward("brevity").per_token == -1.0
    assert load_reward("vader").per_token == 0.0


def test_patterns() -> None:
    assert load_reward("regex:(?i)dog|cat")(samples("a Dog", "a bird", "cats")) == [1.0, 0.0, 1.0]
    assert load_reward("regex:2*3")(samples("2223")) == [1.0]
    with pytest.raises(ValueError, match="pattern '\\(' cannot be read: missing"):
        PatternReward("(")


def test_checkers_are_commands(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text("import os, sys; sys.exit(sys.stdin.read() not in os.environ['PROMPT'])")
    reward = load_reward(f"checker:{sys.executable} {script}")
    assert reward([Sample("1 + 1 = 2", "2", 1), Sample("1 + 1 = 2", "3", 1)]) == [1.0, 0.0]
    missing = CheckerReward(str(tmp_path / "none"))
    values, failures = judge(missing, samples("a"))
    assert values == [None]
    assert "FileNotFoundError" in failures[0].reason
    with pytest.raises(ValueError, match="a checker needs a command"):
        CheckerReward(" ")


def test_functions_are_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_reward_module.py").write_text(
        "class Box:\n    @staticmethod\n    def judge(prompt, response):\n"
        "        return prompt in response\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = load_reward("my_reward_module:Box.judge")
    assert reward.name == "my_reward_module:Box.judge"
    assert reward([Sample("a", "cat", 1), Sample("x", "cat", 1)]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="'my_reward_module:other' cannot be imported"):
        load_reward("my_reward_module:other")
    with pytest.raises(ValueError, match="is a int, no function"):
        load_reward("my_reward_module:number")
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        load_reward("no_such_module:f")


def test_sums_have_weights() -> None:
    both = load_reward(["cheerfulness", "-0.5*length"])
    assert isinstance(both, WeightedSum)
    assert both.name == "1*cheerfulness + -0.5*length"
    happy = samples("She was happy.")
    assert both(happy) == [pytest.approx(cheerfulness("She was happy.") - 1.5)]
    assert both.per_token == 0.0
    assert load_reward(["2*length", "brevity"]).per_token == 1.0
    assert load_reward("2e-1*brevity")(happy) == [pytest.approx(-0.6)]


@pytest.mark.parametrize("wrong", ["joy", "regex:", "my reward:f", "", "2*"])
def test_an_unknown_reward_names_what_there_is(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"reward is .*; allowed are cheerfulness, vader, length"):
        load_reward(wrong)


def test_one_bad_sample_takes_no_other_with_it() -> None:
    calls = []

    def picky(prompt: str, response: str) -> float:
        calls.append(response)
        if response == "bad":
            raise KeyError("bad")
        return {"inf": float("inf")}.get(response, 1.0)

    values, failures = judge(FunctionReward(picky), samples("a", "bad", "inf", "b"))
    assert values == [1.0, None, None, 1.0]
    assert failures == [Failure(1, "KeyError: 'bad'"), Failure(2, "the reward is inf")]

    class Short:
        name, per_token = "short", 0.0

        def __call__(self, given: object) -> list[float]:
            return [1.0]

    with pytest.raises(ValueError, match="reward short gave 1 numbers for 2 samples"):
        judge(Short(), samples("a", "b"))
