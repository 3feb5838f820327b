"""Studies from YAML: what their entries mean, and mistakes in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastguide import ARGS, VAS
from fastguide.config import Plain
from fastguide.evaluate import read_study


def test_lists_become_points(study: Path) -> None:
    points = read_study(study).points
    assert [p.name for p in points] == [
        "plain",
        "VAS beta=0",
        "VAS beta=4",
        "BoN best_of=1",
        "BoN best_of=3",
    ]
    assert points[2].rule == VAS(beta=4.0, k=8)
    assert points[2].weights == {"cheerful": 1.0}
    assert (points[4].rule, points[4].best_of, points[4].sampling.n) == (Plain(), 3, 4)
    assert points[3].draws == points[4].draws != points[0].draws


def test_prompts_may_lie_in_a_file(study: Path) -> None:
    study.write_text(
        study.read_text().replace("[Once upon a time, Tom had a red ball.]", "lines.txt")
    )
    (study.parent / "lines.txt").write_text("One day\n\nA cat\n")
    assert list(read_study(study).prompts) == ["One day", "A cat"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("dtype:", "dtypo:", "the study has the entry 'dtypo'; allowed are"),
        ("rule: vas", "rule: vass", "rule of the method 'VAS' is 'vass'; allowed are vas, args"),
        ("rule: vas, ", "", "rule of the method 'VAS' is None; allowed are vas, args, fudge"),
        ("reward: cheerfulness", "", "the study has no reward; for example reward: cheer"),
        ("seed: 3", "sead: 3", "sampling of the method 'plain' has 'sead'; allowed are"),
        ("[Once upon a time, Tom had a red ball.]", "none.txt", "cannot read prompts from"),
        ("k: 8", "k: [1, 2]", "varies beta and k; allowed is one"),
        (
            "k: 8",
            "kk: 8",
            "'VAS' has 'kk'; allowed are best_of, beta, candidate_mass, fill, guide, k",
        ),
        ("k: 8", "k: 0", "k is 0; allowed are whole numbers from 1"),
        ("guide: cheerful", "guide: joy", "VAS beta=0 has guide 'joy'; the study has cheerful"),
        (
            "best_of: [1, 3]",
            "best_of: [1, 9]",
            "BoN best_of=9 takes the best of 9; allowed are whole numbers from",
        ),
        ("baseline: plain", "baseline: plane", "baseline is 'plane'; there are plain, VAS"),
        ("sentiment:", "kl:", "a held-out reward is called 'kl', which means something else"),
        ("dtype: float32", "judge: {url: here, model: m}", "url is 'here'; allowed are http://"),
        ("[0, 4.0]", "[4, 4.0]", "'VAS beta=4' is there 2 times"),
        ("prompts: [Once upon a time", "promts: [Once", "the study has the entry 'promts'"),
        ("[Once upon a time, Tom", "[2024, Tom", "a prompt is 2024; allowed are texts"),
        ("[Once upon a time, Tom had a red ball.]", "{a: b}", "prompts is {'a': 'b'}; allowed"),
        ("{cheerful: cheerful}", "[cheerful]", r"guides is ['cheerful']; allowed is a mapping"),
        ("guide: cheerful, ", "", "VAS beta=0 needs a guide, got none"),
        (
            "rule: none",
            "rule: none, guide: cheerful",
            "plain takes no guide, got {'cheerful': 1.0}",
        ),
        (
            "guide: cheerful",
            "guide: [cheerful]",
            "guide of the method 'VAS' is ['cheerful']; allowed are a name",
        ),
        ("dtype: float32", "judge: {uri: x}", "judge has 'uri'; allowed are attempts, batch"),
        ("dtype: float32", "judge: {url: http://x}", "judge lacks 'model'; it needs url, model"),
        ("max_tokens: 12", "max_tokens: many", "max_tokens is 'many'; allowed are whole numbers"),
        ("reward: cheerfulness", "reward: 5", "reward is 5; allowed is a text, such as cheerf"),
        ("reward: cheerfulness", "reward: []", "reward is []; allowed is a text, such as cheerf"),
        ("sentiment: vader", "sentiment: 5", "held_out is {'sentiment': 5}; allowed is a mapping"),
        ("dtype: float32", "dtype: float31", "dtype is 'float31'; allowed are auto, float32"),
        ("cheerful: cheerful", "cheerful: 5", "guides is {'cheerful': 5}; allowed is a mapping"),
        ("dtype: float32", "max_rows: x", "max_rows is 'x'; allowed are whole numbers from 1"),
        ("dtype: float32", "max_rows: 0", "max_rows is 0; allowed are whole numbers from 1"),
        ("dtype: float32", "policy: 5", "policy is 5; allowed is a path, a hub id or the name"),
        ("dtype: float32", "device: 5", "device is 5; allowed are cpu, cuda and cuda:N"),
        ("dtype: float32", "chat: 5", "chat is 5; allowed are true and false"),
        ("dtype: float32", "trust_remote_code: 1", "trust_remote_code is 1; allowed are true"),
        ("dtype: float32", "coherence: 5", "coherence is 5; allowed is the path of an encoder"),
        ("dtype: float32", "coherence: {pooling: cls}", "it needs the path of an encoder"),
        ("dtype: float32", "judge: 5", "judge is 5; allowed is a mapping"),
        ("dtype: float32", "judge: {url: http://x, model: 5}", "judge: model is 5; allowed are te"),
        (
            "dtype: float32",
            "judge: {url: http://x, model: m, batch: a}",
            "judge: batch is 'a'; a",
        ),
        (
            "dtype: float32",
            "judge: {url: http://x, model: m, options: 5}",
            "judge: options is 5; allowed is a mapping of JSON values",
        ),
        (
            "best_of: [1, 3]",
            "best_of: 0",
            "BoN takes the best of 0; allowed are whole numbers from 1 to 4",
        ),
        (
            "best_of: [1, 3]",
            "best_of: 1.5",
            "BoN takes the best of 1.5; allowed are whole numbers from 1 to",
        ),
        (
            "best_of: [1, 3]",
            "best_of: a",
            "BoN takes the best of 'a'; allowed are whole numbers from 1 to 4",
        ),
        (
            "best_of: [1, 3]",
            "best_of: []",
            "the method 'BoN' has an empty list of best_of; allowed are values",
        ),
        ("n: 4}", "n: 4, temperature: 0}", "BoN best_of=3 takes the best of 3 at temperature 0"),
        ("sampling: {n: 4}", "sampling: 5", "sampling of the method 'BoN' is 5; allowed is a ma"),
        ("sampling: {n: 4}", "sampling: {stop: 5}", "sampling of the method 'BoN' is {'temperat"),
        ("{temperature: 0.7, max_tokens: 12, n: 2, seed: 3}", "5", "sampling is 5; allowed is a"),
        ("rule: none}", "rule: none}\n  - 5", "a method is 5; allowed are mappings, such as"),
        ("name: plain", "name: 5", "the name of a method is 5; allowed are texts"),
        ("rule: none", "rule: none, policy: 5", "policy of the method 'plain' is 5; allowed are"),
        ("guide: cheerful", "guide: {cheerful: a}", "the weight of guide 'cheerful' is 'a'; all"),
        ("k: 8", "best_of: 3", "VAS beta=0 takes the best of 3; allowed are whole numbers from 1"),
        ("sentiment:", "method:", "a held-out reward is called 'method', which means something"),
        ("prompts:", "1: x\nprompts:", "the study has the entry 1; allowed are"),
        ("prompts: [", "prompts: [[", "cannot read the study"),
        ("dtype: float32", "coherence: {pool: x}", "coherence has 'pool'; allowed are path"),
    ],
)
def test_mistakes_are_named(study: Path, old: str, new: str, said: str) -> None:
    study.write_text(study.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(said)):
        read_study(study)


def test_rules_of_a_study_are_those_of_the_engine(study: Path) -> None:
    study.write_text(
        study.read_text().replace("rule: vas", "rule: args").replace("beta:", "weight:")
    )
    assert read_study(study).points[2].rule == ARGS(weight=4.0, k=8)


def test_a_method_may_name_its_policy(study: Path) -> None:
    study.write_text(
        study.read_text().replace("{name: plain, rule: none}", "{name: plain, policy: stories}")
    )
    assert read_study(study).points[0].policy == "stories"


def test_guided_responses_may_compete(study: Path) -> None:
    text = study.read_text().replace("beta: [0, 4.0], k: 8", "beta: 4.0, best_of: [1, 2]")
    study.write_text(text)
    _, one, two, *_ = read_study(study).points
    assert (one.name, one.best_of, two.name, two.best_of) == (
        "VAS best_of=1",
        1,
        "VAS best_of=2",
        2,
    )
    assert one.rule == two.rule == VAS(beta=4.0)
    assert one.draws == two.draws


def test_code_of_checkpoints_runs_only_if_that_is_said(study: Path) -> None:
    assert not read_study(study).trust_remote_code
    study.write_text(study.read_text() + "trust_remote_code: true\n")
    assert read_study(study).trust_remote_code
