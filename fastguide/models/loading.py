"""Load policies, backbones and tokenizers from a hub id, a local path or a packaged name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastguide.assets import resolve
from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder
from fastguide.models.support import check_config, check_model

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """The torch dtype of a name; None and "auto" give "auto", the dtype of the checkpoint.

    Raises:
        ValueError: for any other name.
    """
    if dtype is None or dtype == "auto":
        return "auto"
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {dtype!r}; allowed are auto, {', '.join(DTYPES)}")
    return found


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; by default the first CUDA device, else the CPU.

    Raises:
        ValueError: for a device that does not exist here.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; allowed are cpu, cuda and cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed are cpu, cuda and cuda:N")
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ValueError(f"device is {device!r}, but this machine has {count} CUDA devices")
    return chosen


def load_pretrained(
    auto_class: Any,
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """``auto_class.from_pretrained`` with fastguide's attention, checks and one-line errors.

    Args:
        auto_class: a transformers auto class, such as ``AutoModelForCausalLM``.
        path: hub id, local path or packaged name.
        dtype: name or torch dtype; None keeps the checkpoint's.
        device: None picks CUDA where there is one.
        trust_remote_code: run code shipped with the checkpoint.
        allow_pickle: also load weights that are not safetensors.
        kwargs: passed on.

    Raises:
        ValueError: for a missing or corrupt checkpoint or an unsupported model.
    """
    where = str(resolve(path))
    config = load_config(where, trust_remote_code=trust_remote_code)
    check_config(config)
    try:
        model = auto_class.from_pretrained(
            where,
            dtype=resolve_dtype(dtype),
            attn_implementation=NAME,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            **kwargs,
        )
    except Exception as error:
        raise ValueError(f"cannot load model weights from {where!r}: {one_line(error)}") from error
    model = model.to(resolve_device(device)).eval().requires_grad_(False)
    check_model(model)
    return model


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config of a checkpoint.

    Raises:
        ValueError: when there is none, it cannot be read, or it is code and that is not trusted.
    """
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        if "custom code" in str(error) and not trust_remote_code:
            raise ValueError(
                f"{str(path)!r} brings code of its own, which runs only with trust_remote_code"
            ) from error
        raise ValueError(
            f"cannot read a model config from {str(path)!r}: {one_line(error)}"
        ) from error


def load_policy(path: str | Path, **kwargs: Any) -> Decoder:
    """A causal language model as a ``Decoder`` whose passes return logits ``[n, V]``.

    Args:
        path: hub id, local path or packaged name.
        kwargs: see ``load_pretrained``.
    """
    model = load_pretrained(AutoModelForCausalLM, path, **kwargs)
    return Decoder(model, context=context_length(model.config))


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: when there is none or it cannot be read.
    """
    where = str(resolve(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(f"cannot load a tokenizer from {where!r}: {one_line(error)}") from error
    # Without files, transformers makes up an empty tokenizer of the model's type.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"cannot load a tokenizer from {where!r}: it holds no vocabulary")
    return tokenizer


def context_length(config: PreTrainedConfig) -> int | None:
    """Most tokens a model takes, by its config; None where it names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def one_line(error: BaseException) -> str:
    """The first sentence of an error message, for messages that must fit one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]


def find_tokenizer(
    *paths: str | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first path that has one; None if none has."""
    for path in filter(None, paths):
        try:
            return load_tokenizer(path, trust_remote_code=trust_remote_code)
        except ValueError:
            continue
    return None
