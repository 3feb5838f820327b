"""Tiny random models of every verified type, and a full recompute by their own attention."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastguide.models.attention import NAME

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=128,
)
NO_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
OPT = dict(
    vocab_size=97,
    hidden_size=48,
    ffn_dim=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    word_embed_proj_dim=32,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=2,
)
GPT2 = dict(vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=128, **NO_TOKENS)
NEOX = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")} | NO_TOKENS
HEADS = {k: v for k, v in SIZES.items() if k != "head_dim"} | NO_TOKENS
FULL = SIZES | NO_TOKENS
GEMMA = FULL | dict(query_pre_attn_scalar=12, sliding_window=8)

CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", FULL),
    "llama-mha": ("llama", FULL | dict(num_key_value_heads=4)),
    "llama-mqa": ("llama", FULL | dict(num_key_value_heads=1)),
    "opt": ("opt", OPT),
    "opt-350m-like": ("opt", OPT | dict(do_layer_norm_before=False)),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-serial": ("gpt_neox", NEOX | dict(use_parallel_residual=False)),
    "gpt2": ("gpt2", GPT2),
    "gpt2-inverse-layer": ("gpt2", GPT2 | dict(scale_attn_by_inverse_layer_idx=True)),
    "qwen2": ("qwen2", HEADS),
    "qwen2-window": (
        "qwen2",
        HEADS | dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "qwen3": ("qwen3", FULL),
    "mistral": ("mistral", FULL | dict(sliding_window=None)),
    "mistral-window": ("mistral", FULL | dict(sliding_window=8)),
    "gemma": ("gemma", FULL),
    "gemma2-softcap": ("gemma2", GEMMA | dict(attn_logit_softcapping=2.0)),
    "gemma3_text": (
        "gemma3_text",
        GEMMA | dict(layer_types=["sliding_attention"] * 2 + ["full_attention"]),
    ),
    "phi": ("phi", HEADS | dict(partial_rotary_factor=0.5)),
    "phi3": ("phi3", HEADS | dict(sliding_window=None)),
    "phi3-window": ("phi3", HEADS | dict(sliding_window=8)),
    "starcoder2": ("starcoder2", HEADS | dict(sliding_window=8)),
    "olmo2": ("olmo2", HEADS),
    "granite": ("granite", HEADS | dict(attention_multiplier=0.2, logits_scaling=2.0)),
    "smollm3": ("smollm3", HEADS | dict(no_rope_layer_interval=2, use_sliding_window=False)),
    "cohere": ("cohere", HEADS | dict(logit_scale=0.3)),
}


def tiny_model(case: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A random model with weights large enough that wrong attention shows."""
    kind, sizes = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
            elif "bias" in name:
                parameter.uniform_(-0.5, 0.5)
    return model.to(dtype)


@torch.inference_mode()
def recompute(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """Logits at the end of each row, by the model's own eager attention on the whole row."""
    model.set_attn_implementation("eager")
    try:
        return torch.stack(
            [model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows]
        )
    finally:
        model.set_attn_implementation(NAME)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 2e-5, f"relative error {float(error):.2g}"


def tokens(start: int, count: int) -> list[int]:
    return [(start * 31 + 17 * i * i + 5 * i) % 97 for i in range(count)]
