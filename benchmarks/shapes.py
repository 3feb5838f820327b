"""The models, prompts and requests that the engine's benchmark and its baselines share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastguide import TreeScorer
from fastguide.config import Rule
from fastguide.engine.rows import Row, RowSpec
from fastguide.engine.runner import ModelRunner
from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder

Shape = dict[str, int]

SHAPE: Shape = dict(
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2_048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    max_position_embeddings=4_096,
)
"""A Llama of 110 M parameters."""

TINY: Shape = dict(
    vocab_size=199,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
)
"""For tests: decodes in no time."""

LLAMA_7B: Shape = dict(
    vocab_size=32_000,
    hidden_size=4_096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4_096,
)
"""Llama-2-7B's."""

SMALLER: Shape = SHAPE | dict(
    hidden_size=384,
    intermediate_size=1_024,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
)
"""A guide of 23 M parameters, of which 11 M are multiplied with."""

LLAMA_1B: Shape = LLAMA_7B | dict(
    hidden_size=2_048,
    intermediate_size=5_632,
    num_hidden_layers=22,
    num_key_value_heads=4,
)
"""TinyLlama's, 1.1 G parameters."""

PAIRS = {"110M": (SHAPE, SMALLER), "7B": (LLAMA_7B, LLAMA_1B), "tiny": (TINY, TINY)}
"""Of a policy and a smaller guide; the last is for tests."""

POLICY_SEED, GUIDE_SEED, HEAD_SEED = 0, 2, 1


def random_llama(
    device: str,
    attention: str,
    dtype: torch.dtype = torch.bfloat16,
    shape: Shape = SHAPE,
    seed: int = POLICY_SEED,
) -> Any:
    """A Llama with random weights, the same each time; it has no end of text."""
    torch.manual_seed(seed)
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(device=device, dtype=dtype).eval()


def random_head(
    device: str, dtype: torch.dtype = torch.bfloat16, shape: Shape = SHAPE
) -> torch.nn.Linear:
    """The guide's scalar head, the same each time."""
    torch.manual_seed(HEAD_SEED)
    return torch.nn.Linear(shape["hidden_size"], 1, device=device, dtype=dtype)


def prompt_tokens(row: int, length: int, shape: Shape = SHAPE) -> list[int]:
    """A prompt of its own for each row."""
    return [(31 * i + 7 * row) % shape["vocab_size"] for i in range(length)]


def build(device: str, dtype: torch.dtype = torch.bfloat16, shape: Shape = SHAPE) -> ModelRunner:
    """fastguide's policy and guide, each with its own weights and pool."""
    policy = random_llama(device, NAME, dtype, shape, POLICY_SEED)
    guide = random_llama(device, NAME, dtype, shape, GUIDE_SEED)
    decoders = Decoder(policy), Decoder(guide.model)
    for decoder in decoders:
        decoder.pack()
    scorer = TreeScorer(decoders[1], random_head(device, dtype, shape))
    return ModelRunner(decoders[0], {"value": scorer})


def open_rows(
    runner: ModelRunner,
    rule: Rule,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    weights: dict[str, float] | None = None,
) -> list[Row]:
    """One running request for each prompt; ``weights`` are of guides, if not of ``value``."""
    weights = (weights or {"value": 1.0}) if rule.guided else {}
    parameters = rule.lower(temperature)
    specs = [RowSpec(p, parameters, weights, seed) for seed, p in enumerate(prompts)]
    rows = runner.open(specs)
    runner.prefill(rows, [len(prompt) for prompt in prompts])
    return rows
