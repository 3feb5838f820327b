"""Whole engines around models with random weights, loaded from folders as a user's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from shapes import GUIDE_SEED, HEAD_SEED, SHAPE, Shape, random_llama
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from fastguide import Engine, RewardGuide, ValueGuide
from fastguide.assets import packaged
from fastguide.models.value import ValueModel

GUIDES = ("equal", "lora", "trunk")


def write_models(folder: Path, shape: Shape = SHAPE) -> None:
    """A policy and a guide of each kind, in bf16, under ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(packaged("stories"))

    def keep(model: Any, name: str) -> None:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    keep(random_llama("cpu", "sdpa", torch.bfloat16, shape), "policy")
    torch.manual_seed(GUIDE_SEED)
    config = LlamaConfig(**shape, num_labels=1, pad_token_id=0)
    keep(LlamaForSequenceClassification(config).to(torch.bfloat16), "equal")
    for name, options in (("lora", {"lora_rank": 16}), ("trunk", {"freeze": True})):
        torch.manual_seed(HEAD_SEED)
        model = ValueModel.create(folder / "policy", **options)  # type: ignore[arg-type]
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.02)
            model.head.weight.normal_(std=0.02)
        model.save_pretrained(folder / name)


def load(folder: Path, device: str, *guides: str, **options: Any) -> Engine:
    """An engine with some of the guides of ``write_models``."""
    chosen = {g: (RewardGuide if g == "equal" else ValueGuide)(folder / g) for g in guides}
    return Engine(folder / "policy", chosen, device=device, **options)
