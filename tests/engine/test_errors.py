"""Wrong input gets one clear sentence; one bad request never harms its neighbours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastguide import (
    ARGS,
    VAS,
    Engine,
    FunctionGuide,
    GenerationError,
    Plain,
    RewardGuide,
    SamplingParams,
    ValueGuide,
)

GOOD = "Once upon a time"


@pytest.fixture(scope="module")
def engine(stories: str, lora_guide: str) -> Engine:
    return Engine(stories, guides={"good": ValueGuide(lora_guide)})


SHORT = SamplingParams(max_tokens=3, seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VAS(beta=math.nan), "beta is nan; allowed are numbers from -1e6 to 1e6"),
        (lambda: VAS(k=0), "k is 0; allowed are whole numbers from 1 to 256"),
        (lambda: VAS(k=257), "k is 257; allowed are whole numbers from 1 to 256"),
        (lambda: VAS(fill="zero"), "fill is 'zero'; allowed are mean, none, drop"),
        (lambda: ARGS(weight=math.inf), "weight is inf; allowed are numbers from -1e6 to 1e6"),
        (lambda: ARGS(form="other"), "form is 'other'; allowed are additive, interpolated"),
        (lambda: ARGS(1.5, form="interpolated"), "weight is 1.5; allowed when interpolated"),
        (lambda: Plain(k=-1), "k is -1"),
        (lambda: SamplingParams(temperature=-1), "temperature is -1; allowed are 0"),
        (lambda: SamplingParams(temperature=1e-9), "temperature is 1e-09"),
        (lambda: SamplingParams(max_tokens=0), "max_tokens is 0; allowed are whole numbers"),
        (lambda: SamplingParams(n=0), "n is 0; allowed are whole numbers from 1"),
        (lambda: SamplingParams(stop=[""]), "allowed are non-empty strings"),
        (lambda: SamplingParams(seed=1.5), "seed is 1.5"),
        (lambda: Engine("stories", guides={}, max_rows=0), "max_rows is 0"),
        (lambda: Engine("stories", guides={}, dtype="int3"), "dtype is 'int3'; allowed are auto"),
        (
            lambda: Engine("stories", {"a": "cheerful"}),
            "guide 'a' is 'cheerful'; allowed are Value",
        ),
        (lambda: Engine("stories", {"a": ValueGuide}), "with a load method"),
        (lambda: Engine("stories", [ValueGuide("brief")]), "allowed is a mapping of names to"),
        (lambda: FunctionGuide(lambda x: 0, on="words"), "on is 'words'; allowed are text, tokens"),
    ],
)
def test_settings(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["", GOOD],), "prompt 0: the prompt is empty"),
        (([],), None),
        (([[1, 5000], GOOD],), "token id 5000; allowed are 0 to 2047"),
        (([[5] * 1024, GOOD],), "the prompt has 1024 tokens; the context of the model is 1024"),
        (([[5] * 1024, GOOD], VAS()), "allowed are at most 1023"),
        (([GOOD], [VAS(), VAS()]), "rule has 2 entries for 1 prompts"),
        (([GOOD], "vas"), "rule is 'vas'; allowed are VAS(...), ARGS(...), Plain() and None"),
        (([GOOD], VAS(), {"bad": 1.0}), "unknown guide 'bad' in weights; allowed are good"),
        (([GOOD], VAS(), {"good": math.nan}), "weight of guide 'good' is nan"),
        (([GOOD], None, {"good": 1.0}), "no guided rule is given"),
        (([GOOD], None, None, {"max_tokens": 3}), "allowed is SamplingParams"),
        (([[{"role": "user", "content": "hi"}], GOOD],), "the tokenizer has no chat template"),
        (([3.5, GOOD],), "allowed are a text, a list of token ids, or chat messages"),
        (([None, GOOD],), "prompt 0: the prompt is None; allowed are a text"),
        (([np.zeros((3, 40)), GOOD],), "the prompt is [[0.0, 0.0,"),
        ((None,), "prompts is None; allowed are a text, a list of token ids"),
        ((5,), "prompts is 5; allowed are"),
        ((b"Once",), "prompts is b'Once'; allowed are"),
        (({"role": "user", "content": "hi"},), "prompts is {'role': 'user'"),
    ],
)
def test_calls(engine: Engine, arguments: tuple, message: str | None) -> None:
    if len(arguments) < 4:
        arguments = (*arguments, *[None] * (3 - len(arguments)), SHORT)
    if message is None:
        assert engine.generate(*arguments) == []
        return
    with pytest.raises(ValueError) as caught:
        engine.generate(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if isinstance(caught.value, GenerationError) and len(caught.value.outputs) > 1:
        assert [c.finish_reason for c in caught.value.outputs] == ["error", "length"]


def test_one_bad_prompt_fails_alone(engine: Engine) -> None:
    prompts = [GOOD, "", "One day", [5] * 2000]
    alone = engine.generate([GOOD, "One day"], VAS(2.0), sampling=SHORT)
    mixed = engine.generate(prompts, VAS(2.0), sampling=SHORT, errors="return")
    assert [c.finish_reason for c in mixed] == ["length", "error", "length", "error"]
    assert [mixed[0].token_ids, mixed[2].token_ids] == [c.token_ids for c in alone]
    assert "prompt 1" in str(mixed[1].error)
    assert "2000 tokens" in str(mixed[3].error)


def test_k_above_the_vocabulary(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    engine = Engine(tmp_path, guides={"f": FunctionGuide(sum, on="tokens")})
    with pytest.raises(ValueError, match=r"k is 51; allowed are 1 to 50 \(vocabulary\)"):
        engine.generate([[1, 2]], VAS(k=51), sampling=SHORT)
    for rule in (VAS(k=50), Plain(k=51), VAS(k=50, fill="none")):
        for temperature in (0.0, 1.0):
            sampling = SamplingParams(temperature=temperature, max_tokens=3, seed=0)
            assert len(engine.generate([[1, 2]], rule, sampling=sampling)[0].token_ids) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_guide_request_and_step(stories: str, bad: float) -> None:
    def score(tokens: list[int]) -> float:
        return bad if tokens[1] == 77 and len(tokens) >= 6 else 0.0

    engine = Engine(stories, guides={"fine": FunctionGuide(len, on="tokens"),
                                     "odd": FunctionGuide(score, on="tokens")})  # fmt: skip
    prompts = [[5, 6, 7], [5, 77, 7], [5, 8]]
    outputs = engine.generate(prompts, VAS(1.0), sampling=SamplingParams(max_tokens=6, seed=1),
                              errors="return")  # fmt: skip
    assert [c.finish_reason for c in outputs] == ["length", "error", "length"]
    error = outputs[1].error
    assert error is not None
    assert "guide 'odd'" in error
    assert f"gave {bad}" in error
    assert "prompt 1" in error
    assert "step 2" in error
    assert len(outputs[1].token_ids) == 2  # what was decoded before is kept


def test_a_function_that_raises_fails_its_request_only(stories: str) -> None:
    def score(text: str) -> float:
        if "dragon" in text:
            raise RuntimeError("no dragons")
        return 0.0

    engine = Engine(stories, guides={"f": FunctionGuide(score)})
    outputs = engine.generate(["The dragon", "The dog"], VAS(1.0), sampling=SHORT, errors="return")
    assert [c.finish_reason for c in outputs] == ["error", "length"]
    assert "guide function score failed: RuntimeError: no dragons" in str(outputs[0].error)


def test_another_tokenizer_is_refused(stories: str, lora_guide: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_tokens(["zebra"])
    import shutil

    folder = tmp_path / "guide"
    shutil.copytree(lora_guide, folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has another tokenizer than the policy: 2049 tokens"):
        Engine(stories, guides={"g": ValueGuide(folder)})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/at/all", "'/nowhere/at/all'"),
        ("no-such-org/no-such-model-xyz", "no-such-org/no-such-model-xyz"),
    ],
)
def test_missing_models(model: str, message: str) -> None:
    for load in (lambda: Engine(model), lambda: Engine("stories", guides={"g": ValueGuide(model)}),
                 lambda: Engine("stories", guides={"g": RewardGuide(model)})):  # fmt: skip
        with pytest.raises(ValueError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_corrupt_weights(stories: str, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(stories, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(ValueError, match="cannot load model weights from") as caught:
        Engine(folder)
    assert "broken" in str(caught.value)


def test_pickled_weights_are_refused_unless_allowed(stories: str, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(stories, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(Path(stories) / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load model weights"):
        Engine(folder)
    allowed = Engine(folder, allow_pickle=True)
    expected = Engine(stories, guides={}).generate(GOOD, sampling=SHORT)[0].token_ids
    assert allowed.generate(GOOD, sampling=SHORT)[0].token_ids == expected


def test_an_interrupt_gives_what_was_done(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine.runner.step
    calls = []

    def interrupted(rows: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(rows)

    monkeypatch.setattr(engine.runner, "step", interrupted)
    stream = engine.completions(
        [GOOD, "One day"], VAS(1.0),
        sampling=[SamplingParams(max_tokens=2, seed=0), SamplingParams(max_tokens=50, seed=0)],
    )  # fmt: skip
    done = [next(stream), next(stream)]
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert [c.finish_reason for c in done] == ["length", "aborted"]
    assert len(done[1].token_ids) == 3
    assert done[1].text
    assert engine.runner.policy.pool.slots.in_use == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_an_interrupt_of_the_caller_is_thrown_in(engine: Engine, streamed: bool) -> None:
    """Ctrl-C while the caller prints: throwing it into the generator gives what was done."""
    sampling = SamplingParams(max_tokens=30, seed=0, n=3, ignore_eos=True)
    if streamed:
        pieces = engine.stream(GOOD, VAS(1.0), sampling=sampling)
        for _ in range(7):
            next(pieces)
        last = [pieces.throw(KeyboardInterrupt)]
        with pytest.raises(KeyboardInterrupt):
            last.extend(pieces)
        done = [piece.completion for piece in last if piece.completion]
    else:
        short = SamplingParams(max_tokens=2, seed=0)
        completions = engine.completions([GOOD, GOOD], VAS(1.0), sampling=[short, sampling])
        assert next(completions).finish_reason == "length"
        done = [completions.throw(KeyboardInterrupt)]
        with pytest.raises(KeyboardInterrupt):
            done.extend(completions)
    assert sorted(c.sample for c in done) == [0, 1, 2]
    assert {c.finish_reason for c in done} == {"aborted"}
    assert all(c.token_ids for c in done)
    assert engine.runner.policy.pool.slots.in_use == 0


def test_code_of_a_checkpoint_does_not_run_unless_asked_for(stories: str, tmp_path: Path) -> None:
    import json
    import shutil

    folder, marker = tmp_path / "custom", tmp_path / "ran"
    shutil.copytree(stories, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig\n"
        f"open({str(marker)!r}, 'w').close()\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n",
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        Engine(folder)
    assert not marker.exists()
    with pytest.raises(ValueError, match="MineConfig"):  # the config loads, no model knows it
        Engine(folder, trust_remote_code=True)
    assert marker.exists()


def test_no_bar_where_there_is_no_terminal(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.generate([GOOD, GOOD], sampling=SHORT, progress=True)
    assert capsys.readouterr().err == ""
