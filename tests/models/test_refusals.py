"""A model that cannot be honoured is refused by name, never run with wrong attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from fastguide.models import loading
from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder
from fastguide.models.support import check_config, check_model

SMALL = dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
DECODER = SMALL | dict(intermediate_size=64, num_key_value_heads=2, head_dim=12)


@pytest.mark.parametrize(
    ("kind", "sizes", "names"),
    [
        ("t5", dict(vocab_size=97, d_model=48, num_layers=1), "encoder"),
        ("falcon", SMALL | dict(alibi=True), "ALiBi"),
        ("qwen3_next", DECODER, "linear_attention"),
        ("llama4_text", DECODER | dict(attention_chunk_size=8), "chunked_attention"),
        ("gemma3_text", DECODER | dict(use_bidirectional_attention=True), "bidirectional"),
        (
            "phi3",
            DECODER
            | dict(
                pad_token_id=0,
                original_max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 10_000.0,
                    "short_factor": [1.0] * 6,
                    "long_factor": [2.0] * 6,
                },
            ),
            "longrope",
        ),
        (
            "llama",
            DECODER
            | dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}),
            "dynamic",
        ),
        ("ministral", DECODER | dict(sliding_window=8), "sliding window of 8"),
    ],
)
def test_configs(kind: str, sizes: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names) as caught:
        check_config(AutoConfig.for_model(kind, **sizes))
    assert kind in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "sizes", "names"),
    [
        ("bloom", dict(vocab_size=97, hidden_size=48, n_layer=2, n_head=4), "BloomForCausalLM"),
        ("stablelm", SMALL | dict(intermediate_size=64), "StableLmForCausalLM"),
        (
            "gpt_oss",
            DECODER
            | dict(
                num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
                layer_types=["full_attention"] * 2, sliding_window=None,
            ),
            "s_aux",
        ),
    ],
)  # fmt: skip
def test_models(kind: str, sizes: dict[str, Any], names: str) -> None:
    config = AutoConfig.for_model(kind, **sizes)
    check_config(config)
    model = AutoModelForCausalLM.from_config(config)
    if kind == "gpt_oss":
        model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=names):
        check_model(model.eval())


def test_an_unlisted_model_is_admitted_by_a_trial_pass() -> None:
    config = AutoConfig.for_model("olmo", **SMALL, intermediate_size=64, pad_token_id=1)
    check_model(AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval())


def test_an_unlisted_model_that_disagrees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("olmo", **SMALL, intermediate_size=64, pad_token_id=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)
    original = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self, s, b: original(self, s, [b[0][::-1]]))
    with pytest.raises(ValueError, match="disagrees with its own attention"):
        check_model(model)


def test_a_call_without_a_plan_is_refused() -> None:
    model = LlamaForCausalLM._from_config(
        AutoConfig.for_model("llama", **DECODER), attn_implementation=NAME
    )
    with pytest.raises(ValueError, match="needs a plan"):
        model(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("dtype", ["float64", "int8", torch.int8])
def test_unknown_dtypes(dtype: Any) -> None:
    with pytest.raises(ValueError, match="allowed are auto, float32, bfloat16, float16"):
        loading.resolve_dtype(dtype)


@pytest.mark.parametrize("device", ["warp", "meta", "mps:0", "cuda:99"])
def test_unknown_devices(device: str) -> None:
    with pytest.raises(ValueError, match=device):
        loading.resolve_device(device)
