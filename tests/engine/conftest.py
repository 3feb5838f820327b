"""A policy and a guide so small that hundreds of requests take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from fastguide import Engine, TreeScorer
from fastguide.guides import LoadContext
from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=63,
)


class TinyGuide:
    """A value model with random weights, and a cache of its own."""

    def load(self, context: LoadContext) -> TreeScorer:
        torch.manual_seed(5)
        model = LlamaModel(LlamaConfig(**SIZES, attn_implementation=NAME))
        head = torch.nn.Linear(SIZES["hidden_size"], 1)
        return TreeScorer(Decoder(model, 256), head)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a language model of 2 layers over the words w0 to w63; w63 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder: Path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(4)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_engine(tiny: str) -> Callable[..., Engine]:
    """Makes engines of the tiny model, guided by ``g``; ``slots`` is the size of their caches."""
    each = 2 * 2 * 2 * SIZES["hidden_size"] * 4  # policy and guide: keys and values of two layers

    def make(slots: int = 4000, **options: Any) -> Engine:
        guides = {"g": TinyGuide(), **options.pop("guides", {})}
        return Engine(tiny, guides=guides, kv_memory=slots * each, dtype="float32", **options)

    return make
