"""Backbones in 8 and 4 bits: values, training of what lies on top, and what becomes of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fastguide import VAS, Engine, SamplingParams, ValueGuide
from fastguide.models import quantization
from fastguide.models.value import ValueModel
from fastguide.train.episodes import Episode
from fastguide.train.value import ValueConfig, ValueTrainer

LIBRARIES = [("torchao", "int8"), ("bitsandbytes", "int8"), ("bitsandbytes", "int4")]


@pytest.fixture(params=LIBRARIES, ids="-".join)
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A quantization config of one library, as if there were no other."""
    library, name = request.param
    pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.setattr(
        quantization, "find_spec", lambda wanted: find_spec(wanted) if wanted == library else None
    )
    return quantization.quantization(name)


def test_a_quantized_backbone_gives_about_the_same_states(scheme: Any) -> None:
    small = ValueModel.create("stories", lora_rank=4, quantization=scheme)
    whole = ValueModel.create("stories", lora_rank=4)
    ids = torch.tensor([[0, 5, 9, 300, 41, 7, 12, 800]])
    states = [
        model.backbone(input_ids=ids, use_cache=False).last_hidden_state.float()
        for model in (small, whole)
    ]
    alike = torch.nn.functional.cosine_similarity(*states, dim=-1)
    assert alike.min() > 0.95


@pytest.mark.parametrize("how", [{"lora_rank": 4}, {"freeze": True}], ids=["lora", "head"])
def test_what_was_trained_on_a_quantized_backbone_loads_on_the_whole_one(
    scheme: Any, how: dict[str, Any], tmp_path: Path
) -> None:
    model = ValueModel.create("stories", quantization=scheme, **how)
    episodes = [Episode((0, 5 + i), (7, 9 + i, 11), float(i % 2) * 2 - 1) for i in range(16)]
    config = ValueConfig(
        output_dir=str(tmp_path / "run"),
        num_train_epochs=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ValueTrainer(model, config, episodes).train()
    changed = [
        name for name, p in model.named_parameters() if name in before and p.ne(before[name]).any()
    ]
    assert any("head" in name for name in changed)
    assert "freeze" in how or any("lora" in name for name in changed)
    model.save_pretrained(tmp_path / "guide")
    loaded = ValueModel.from_pretrained(tmp_path / "guide", merge="lora_rank" in how)
    ids = torch.tensor([[0, 6, 7, 10, 11]])
    with torch.no_grad():
        found, there = loaded(ids), model.eval()(ids)
    assert (found - there).abs().max() < 0.5 * there.std() + 0.1


def test_what_cannot_be_quantized_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="quantization is 'int2'; allowed are int8, int4"):
        quantization.quantization("int2")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fastguide\[quantize\]'"):
        quantization.quantization("int8")
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        quantization.quantization("int4")
    with pytest.raises(ValueError, match="a quantized backbone cannot train"):
        ValueModel.create("stories", lora_rank=None, quantization=object())


@pytest.mark.parametrize(("scheme", "worst"), [("int8", 0.1), ("fp8", 0.4)])
@pytest.mark.parametrize("way", ["one-pass", "two-phase"])
def test_engines_of_quantized_models_stay_close(
    lora_guide: str, full_guide: str, scheme: str, worst: float, way: str
) -> None:
    """Policy, a LoRA on it, and a guide with weights of its own."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    weights, prompts = {"lora": 1.0, "full": 0.5}, ["Once upon a time", "The dog ran to the"]
    found = []
    for quantize in (None, scheme):
        guides = {"lora": ValueGuide(lora_guide), "full": ValueGuide(full_guide, quantize=quantize)}
        engine = Engine(
            "stories", guides, dtype="float32", device="cpu", quantize=quantize, way=way
        )
        assert set(engine.runner.ways.inside) == {"lora"}
        found.append(engine.generate(prompts, VAS(0.0), weights, sampling))
        assert engine.policy.endswith("" if quantize is None else f"+{scheme}")
    for whole, small in zip(*found, strict=True):
        assert small.base_logprobs[0] != whole.base_logprobs[0]  # something was quantized
        assert small.token_ids == whole.token_ids
        assert small.base_logprobs[0] == pytest.approx(whole.base_logprobs[0], abs=worst)
        assert small.scores[0] == pytest.approx(whole.scores[0], abs=worst)


def test_schemes_that_cannot_be_had(lora_guide: str) -> None:
    with pytest.raises(ValueError, match="quantize is 'int3'; allowed are int8, fp8, int4"):
        Engine(quantize="int3")
    with pytest.raises(ValueError, match="quantize is 'int3'"):
        Engine("stories", {"g": ValueGuide(lora_guide, quantize="int3")})
    with pytest.raises(ValueError, match=r"quantize is 'int4', of torch\.float32 on cpu; allowed"):
        Engine(guides={}, quantize="int4", dtype="float32", device="cpu")
