"""Studies: read from YAML, run, continued, and shown."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastguide import VAS, Engine, SamplingParams
from fastguide.assets import packaged
from fastguide.cli.evaluate import evaluate
from fastguide.config import Plain
from fastguide.evaluate import Point, Runner, Study, read_study
from fastguide.evaluate.report import table
from fastguide.evaluate.stamps import stamp
from fastguide.request import Completion
from fastguide.rewards import Sample, load_reward
from fastguide.search import expected_best, kl_of_best


def test_a_study_measures_what_it_says(study: Path, tmp_path: Path) -> None:
    results = Runner(read_study(study), tmp_path / "out").run()
    plain, zero, guided, one, three = results
    # beta 0 is the policy, token for token.
    assert zero["example"] == plain["example"]
    assert zero["reward"] == plain["reward"]
    assert zero["win_rate"]["mean"] == 0.5
    assert zero["kl"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert guided["kl"]["mean"] > 0
    assert "win_rate" not in plain
    assert guided["guide_flops"] > guided["policy_flops"] > plain["guide_flops"] == 0
    # Best of 3 of 4 is the estimator of the responses that are kept.
    rows = next(
        rows
        for file in (tmp_path / "out").glob("responses-*.json")
        if len(rows := json.loads(file.read_text())["rows"]) == 8
    )
    by_prompt = [[r["reward"] for r in rows if r["prompt"] == p] for p in (0, 1)]
    expected = sum(expected_best(rewards, 3) for rewards in by_prompt) / 2
    assert three["reward"]["mean"] == pytest.approx(expected)
    assert three["kl"]["mean"] == pytest.approx(kl_of_best(3), abs=1e-6)
    assert one["reward"]["mean"] == pytest.approx(sum(sum(r) / 4 for r in by_prompt) / 2)
    tokenizer = AutoTokenizer.from_pretrained(packaged("stories"))
    texts = [tokenizer.decode(r["token_ids"], skip_special_tokens=True) for r in rows]
    assert [text.strip() for text in texts] == [r["text"].strip() for r in rows]
    judged = [Sample("", r["text"], r["tokens"]) for r in rows]
    assert [r["reward"] for r in rows] == pytest.approx(load_reward("cheerfulness")(judged))
    text = table(results)
    assert text.count("\n") == 2 + len(results)
    assert "| VAS beta=4 |" in text


def test_the_command_writes_results_table_and_plots(study: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastguide.cli", "evaluate", str(study)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert "| VAS beta=4 |" in done.stdout
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {
        "results.json",
        "table.md",
        "frontier-reward.png",
        "frontier-sentiment.png",
        "sweep-beta.png",
        "sweep-best_of.png",
    } <= names
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert [point["point"] for point in record["points"]][2] == "VAS beta=4"
    assert record["study"]["reward"] == "cheerfulness"
    assert record["study"]["stamp"] == stamp(None)
    assert set(record["study"]["versions"]) == {"fastguide", "torch", "transformers"}
    wrong = subprocess.run(
        [*command[:-1], "none.yaml", "--out", "x"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    *_, last = wrong.stderr.splitlines()  # libraries may have warned before
    assert last.startswith("error: cannot read the study 'none.yaml'")


def test_another_policy_is_compared_by_its_distance_from_the_first(tmp_path: Path) -> None:
    """A policy beside itself has no distance; another one has what its distributions differ by."""
    other = tmp_path / "other"
    shutil.copytree(packaged("stories"), other)
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.3)  # as if it were sampled at temperature / 1.3
    model.save_pretrained(other)
    sampling = SamplingParams(temperature=0.7, max_tokens=4, n=1024, seed=0)
    cooler = SamplingParams(temperature=0.7 / 1.3, max_tokens=4, n=1024, seed=0)
    points = [
        Point("policy", {}, Plain(), {}, sampling),
        Point("same", {}, VAS(beta=40.0, k=8), {"cheerful": 1.0}, sampling, policy="stories"),
        Point("guided", {}, VAS(beta=40.0, k=8), {"cheerful": 1.0}, sampling),
        Point("other", {}, Plain(), {}, sampling, policy=str(other)),
        Point("cooler", {}, Plain(), {}, cooler),
    ]
    study = Study(["Once"], points, guides={"cheerful": "cheerful"}, dtype="float32")
    runner = Runner(study, tmp_path / "study")
    rows = {point.name: runner.responses(point) for point in points}
    assert [r["text"] for r in rows["same"]] == [r["text"] for r in rows["guided"]]
    assert [r["text"] for r in rows["other"]] == [r["text"] for r in rows["cooler"]]
    outputs = Engine(str(other), {}, dtype="float32").generate("Once", sampling=sampling)
    exact = {
        "same": statistics.fmean(r["kl"] for r in rows["guided"]),
        "other": statistics.fmean(tempering(model, o, temperature=0.7, by=1.3) for o in outputs),
    }
    for name, mean in exact.items():
        ratios = [r["kl"] for r in rows[name]]
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        assert statistics.fmean(ratios) == pytest.approx(mean, abs=4 * error)
        assert error < mean / 4  # else the line above could hardly fail


@torch.inference_mode()
def tempering(model: Any, output: Completion, *, temperature: float, by: float) -> float:
    """The exact KL, along a response to "Once", from the model with its logits over ``by``."""
    tokens = AutoTokenizer.from_pretrained(packaged("stories"))("Once").input_ids
    ids = torch.tensor([[*tokens, *output.token_ids]])
    logits = model(ids).logits[0, len(tokens) - 1 : -1] / temperature
    ours, theirs = logits.log_softmax(-1), (logits / by).log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum().item()


def test_policies_with_other_tokenizers_have_no_distance(tmp_path: Path) -> None:
    other = Path("../shared/models/stories260k")
    if not other.is_dir():
        pytest.skip("shared/models is absent")
    sampling = SamplingParams(temperature=0.7, max_tokens=4, n=2, seed=0)
    point = Point("other", {}, Plain(), {}, sampling, policy=str(other))
    study = Study(["Once", "Tom"], [point], reward="length")
    (result,) = Runner(study, tmp_path).run()
    assert "| other | +4.000 |" in table([result])
    assert result["kl"]["mean"] is None


def test_kl_is_from_the_policy_at_one_temperature(tmp_path: Path) -> None:
    """Also of what was not drawn, and of what was drawn at another temperature."""
    usual = SamplingParams(temperature=0.7, max_tokens=4, n=64, seed=0)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, seed=0)
    warmer = SamplingParams(temperature=1.0, max_tokens=4, n=768, seed=0)
    points = [
        Point("greedy", {}, Plain(), {}, greedy),
        Point("policy", {}, Plain(), {}, usual),
        Point("warmer", {}, Plain(), {}, warmer),
    ]
    study = Study(["Once"], points, dtype="float32", baseline="policy")
    assert study.temperature == 0.7
    runner = Runner(study, tmp_path)
    found = {point.name: runner.responses(point) for point in points}
    model = AutoModelForCausalLM.from_pretrained(packaged("stories"), dtype=torch.float32)
    engine = runner.engine()
    (output,) = engine.generate("Once", sampling=greedy)
    assert found["greedy"][0]["kl"] == pytest.approx(surprise(model, output, 0.7), rel=1e-4)
    assert {row["kl"] for row in found["policy"]} == {0.0}
    outputs = engine.generate("Once", sampling=dataclasses.replace(warmer, seed=0))
    exact = statistics.fmean(tempering(model, o, temperature=1.0, by=0.7) for o in outputs)
    ratios = [row["kl"] for row in found["warmer"]]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    assert statistics.fmean(ratios) == pytest.approx(exact, abs=4 * error)
    assert error < exact / 4


@torch.inference_mode()
def surprise(model: Any, output: Completion, temperature: float) -> float:
    """Minus the log-likelihood of a response to "Once"."""
    tokens = AutoTokenizer.from_pretrained(packaged("stories"))("Once").input_ids
    ids = torch.tensor([[*tokens, *output.token_ids]])
    logprobs = (model(ids).logits[0, len(tokens) - 1 : -1] / temperature).log_softmax(-1)
    return -logprobs.gather(-1, torch.tensor(output.token_ids)[:, None]).sum().item()


def test_what_measures_differently_measures_again(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function with another text is another reward; what was sampled stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "wordy.py"
    study.write_text(study.read_text().replace("sentiment: vader", "words: 'wordy:count'"))

    def run(code: str) -> float:
        sys.modules.pop("wordy", None)
        importlib.invalidate_caches()
        module.write_text(code)
        return Runner(read_study(study), tmp_path / "out").run()[0]["words"]["mean"]

    body = "def count(prompt, response):\n    return {}\n"
    once = run(body.format("len(response.split())"))
    monkeypatch.setattr(Runner, "_sample", None)  # not called again
    assert run(body.format("len(response.split()) + 0 * 1")) == once
    assert run(body.format("2.0 * len(response.split())")) == 2 * once


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("reward: cheerfulness", "reward: joy", "reward is 'joy'; allowed are cheerfulness"),
        ("sentiment: vader", "sentiment: joy", "held_out 'sentiment': reward is 'joy'; allowed"),
        ("dtype: float32", "device: moon", "device is 'moon'; allowed are cpu, cuda"),
        ("rule: none", "rule: none, policy: ./none", "no model at './none'"),
        ("cheerful: cheerful", "cheerful: ./none", "no guide at './none'"),
        ("rule: vas", "rule: fudge", "FUDGE beta=0, prompt 0: guide 'cheerful' is a value model"),
        ("Once upon a time", "''", "prompt 0: "),
        ("Once upon a time", "'and and and" + " and" * 1100 + "'", "plain, prompt 0: the prompt h"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_sampled(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str
) -> None:
    monkeypatch.setattr(Engine, "completions", None)
    text = study.read_text().replace(old, new)
    if "fudge" in new:
        text = text.replace("name: VAS", "name: FUDGE").replace("beta: [0, 4.0]", "weight: [0, 4]")
        said = said.replace("beta", "weight")
    study.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        Runner(read_study(study), tmp_path / "out").run()


def test_missing_plots_are_said_before_anything_is_sampled(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(Runner, "run", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'fastguide\[eval"):
        evaluate(str(study), str(tmp_path / "out"))


def test_guided_best_of_n_is_measured(study: Path, tmp_path: Path) -> None:
    study.write_text(
        study.read_text()
        .replace("beta: [0, 4.0], k: 8", "beta: 4.0, k: 8, best_of: [1, 2]")
        .replace("  - {name: BoN, rule: none, best_of: [1, 3], sampling: {n: 4}}\n", "")
    )
    runner = Runner(read_study(study), tmp_path / "out")
    plain, one, two = runner.run()
    rows = runner.responses(runner.study.points[1])
    best = [max(r["reward"] for r in rows if r["prompt"] == p) for p in (0, 1)]
    assert two["reward"]["mean"] == pytest.approx(statistics.fmean(best))
    assert two["kl"]["mean"] > one["kl"]["mean"] > plain["kl"]["mean"]
    assert two["guide_flops"] > 1.5 * one["guide_flops"] > 0


def test_too_many_failures_stop_a_study(study: Path, tmp_path: Path) -> None:
    study.write_text(
        study.read_text().replace("sentiment: vader", "'checked': 'checker:./nowhere-at-all'")
    )
    said = (
        r"reward checker:.* failed on 4 of 4 samples \(allowed are 5 %\), first on plain, prompt 0"
    )
    with pytest.raises(ValueError, match=said):
        Runner(read_study(study), tmp_path / "out").run()
    (kept,) = (tmp_path / "out").glob("responses-*.json")
    assert len(json.loads(kept.read_text())["rows"]) == 4  # what was sampled is not lost


def test_chats_are_asked_in_the_template_and_judged_without_it(
    chatting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Once upon\\na time"}\n"Tom"\n')
    (tmp_path / "study.yaml").write_text(
        f"""
prompts: prompts.jsonl
chat: true
policy: {chatting}
reward: seen:reward
dtype: float32
sampling: {{temperature: 0.7, max_tokens: 6, seed: 3}}
baseline: plain
methods:
  - {{name: plain, rule: none}}
  - {{name: cold, rule: none, sampling: {{temperature: 0.5}}}}
"""
    )
    (tmp_path / "seen.py").write_text(
        "SEEN = []\ndef reward(prompt, response):\n    SEEN.append(prompt)\n    return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    compared = read_study(tmp_path / "study.yaml")
    runner = Runner(compared, tmp_path / "out")
    plain, cold = runner.run()
    assert set(importlib.import_module("seen").SEEN) == {"Once upon\na time", "Tom"}
    said = [f"The user said: {text}\nThe answer is:" for text in compared.prompts]
    texts = dataclasses.replace(compared, prompts=said, chat=False)
    rows = Runner(texts, tmp_path / "texts")
    for point in compared.points:
        found, wanted = runner.responses(point), rows.responses(point)
        assert [r["text"] for r in found] == [r["text"] for r in wanted]
        assert [r["kl"] for r in found] == pytest.approx([r["kl"] for r in wanted], abs=1e-6)
    assert plain["kl"]["mean"] == 0.0
    assert cold["kl"]["mean"] != 0.0
