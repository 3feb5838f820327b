"""What goes wrong in one request stays in that request."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastguide import (
    VAS,
    Completion,
    Engine,
    FunctionGuide,
    GenerationError,
    SamplingParams,
    ValueGuide,
)
from fastguide.guides import LoadContext
from fastguide.guides.function import FunctionScorer
from fastguide.request import GenerationInterrupt

PROMPTS = ["Once upon a time, there was a dog.", "One day", "Tom ran to the"]
SAMPLING = SamplingParams(temperature=0.8, max_tokens=6, seed=4)


@pytest.fixture(scope="module")
def engine(stories: str, full_guide: str) -> Engine:
    return Engine(stories, guides={"g": ValueGuide(full_guide)}, dtype="float32")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, bad: float, temperature: float
) -> None:
    sampling = SamplingParams(temperature=temperature, max_tokens=6, seed=4)
    expected = engine.generate(PROMPTS, VAS(2.0), sampling=sampling)
    run, calls = engine.runner.policy.run, []

    def overflowing(sequences: Any, branches: Any = None) -> Tensor:
        logits = run(sequences, branches).clone()
        calls.append(1)
        if len(calls) == 3:
            logits[1, 7] = bad
        return logits

    monkeypatch.setattr(engine.runner.policy, "run", overflowing)
    found = engine.generate(PROMPTS, VAS(2.0), sampling=sampling, errors="return")
    assert [c.finish_reason for c in found] == ["length", "error", "length"]
    assert "prompt 1, sample 0: the model gave logits that are not finite at step 2" in str(
        found[1].error
    )
    assert [found[0].token_ids, found[2].token_ids] == [
        expected[0].token_ids,
        expected[2].token_ids,
    ]


def test_nan_in_one_cache_does_not_reach_shorter_neighbours(engine: Engine) -> None:
    decoder = engine.runner.policy
    short, long = decoder.open([5, 6]), decoder.open(list(range(30, 60)))
    alone = decoder.run([short])
    short.truncate(0)
    decoder.prefill([long])
    for layer in range(6):
        for tensor in decoder.pool.layer(layer):
            with torch.inference_mode():
                tensor[long.slots] = math.nan
    long.append(7)
    short.append(5, 6)
    found = decoder.run([short, long])
    assert torch.isnan(found[1]).all()
    assert torch.allclose(found[0], alone[0], atol=1e-5)
    with torch.inference_mode():
        for layer in range(6):
            for tensor in decoder.pool.layer(layer):
                tensor.zero_()
    short.close()
    long.close()
    engine.clear_prefixes()  # what they were is gone


class Brittle:
    """A guide of the user's own that fails in every way on prompts that hold token 77."""

    def __init__(self, where: str) -> None:
        self.where = where

    def load(self, context: LoadContext) -> FunctionScorer:
        where = self.where

        class Scorer(FunctionScorer):
            def open(self, tokens: Any) -> Any:
                if where == "open" and 77 in tokens:
                    raise KeyError("no such state")
                return super().open(tokens)

            def score(self, states: Any, candidates: Any) -> Any:
                if where == "score" and any(77 in s.tokens for s in states):
                    raise RuntimeError("no such score")
                return super().score(states, candidates)

        guide = FunctionGuide(lambda tokens: 0.0, on="tokens")
        return Scorer(guide, context.tokenizer, context.device)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("open", "prompt 1: KeyError: 'no such state'"),
        ("score", "guide 'g' failed at step 0: RuntimeError: no such score"),
    ],
)
def test_guides_that_raise_anything(stories: str, where: str, message: str) -> None:
    engine = Engine(stories, guides={"g": Brittle(where)})
    prompts = [[5, 6], [5, 77], [8]]
    found = engine.generate(prompts, VAS(1.0), sampling=SAMPLING, errors="return")
    assert [c.finish_reason for c in found] == ["length", "error", "length"]
    assert message in str(found[1].error)
    assert engine.runner.policy.pool.slots.in_use == 0


def test_a_streamed_sample_fails_after_its_siblings_have_ended(stories: str) -> None:
    firsts: set[int] = set()

    def score(tokens: list[int]) -> float:
        if len(tokens) >= 4:
            firsts.add(tokens[2])  # the samples' first tokens: the prompt has two
        return math.nan if len(tokens) > 5 and tokens[2] == min(firsts) else 0.0

    engine = Engine(stories, guides={"f": FunctionGuide(score, on="tokens")})
    sampling = SamplingParams(temperature=1.5, max_tokens=8, seed=2, n=4, ignore_eos=True)
    ended: list[Completion] = []
    pieces = engine.stream([5, 9], VAS(1.0, k=3), sampling=sampling)
    with pytest.raises(GenerationError) as caught:
        ended.extend(piece.completion for piece in pieces if piece.completion)
    reasons = sorted(str(c.finish_reason) for c in ended)
    assert "error" in reasons
    assert "length" in reasons
    assert len(reasons) == 4
    assert caught.value.outputs == [c for c in ended if c.finish_reason == "error"]


def test_generate_keeps_what_was_done_when_interrupted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = engine.runner.step, []

    def interrupted(rows: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(rows)

    monkeypatch.setattr(engine.runner, "step", interrupted)
    sampling = [SamplingParams(max_tokens=n, seed=0) for n in (2, 50, 50)]
    with pytest.raises(GenerationInterrupt) as caught:
        engine.generate(PROMPTS, VAS(1.0), sampling=sampling)
    outputs = sorted(caught.value.outputs, key=lambda c: c.prompt)
    assert [c.finish_reason for c in outputs] == ["length", "aborted", "aborted"]
    assert [len(c.token_ids) for c in outputs] == [2, 3, 3]


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    engine = Engine(tmp_path)
    sampling = dataclasses.replace(SAMPLING, ignore_eos=True)
    found = engine.generate(["w1 w2", "  ", "w59", "w3"], sampling=sampling, errors="return")
    assert [c.finish_reason for c in found] == ["length", "error", "error", "length"]
    assert "prompt 1: the prompt is empty" in str(found[1].error)
    assert "token id 59; allowed are 0 to 49" in str(found[2].error)  # past the embedding


def test_the_packaged_model_and_guides_are_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("stories", "cheerful", "brief"):
        (tmp_path / name).mkdir()  # folders of these names do not stand in the way
    engine = Engine()
    assert {"cheerful", "brief"} <= set(engine.guides)
    out = engine.generate("Once upon a time", VAS(2.0), {"brief": 1.0}, SAMPLING)[0]
    assert out.mean_score is not None


def test_chats_are_generated_from(stories: str) -> None:
    engine = Engine(stories, guides={})
    engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "Once upon a time"}]
    ids = engine.tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    found = engine.generate([chat], sampling=SAMPLING)[0]
    assert found.token_ids == engine.generate([ids], sampling=SAMPLING)[0].token_ids
