"""Load policies, backbones and tokenizers from a hub id, a local path or a packaged name."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging

from fastguide.assets import resolve
from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder
from fastguide.models.locate import holds, locate
from fastguide.models.support import check_config, check_model

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

LONGEST_REASON = 300
"""Most characters of another library's message that go into one of ours."""


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
    parallel: bool = False,
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
        parallel: share the weights out among the ranks of this launch, by the model's own plan.
        kwargs: passed on.

    Raises:
        ValueError: for a missing, corrupt or incomplete checkpoint or an unsupported model.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    check_config(config)
    if parallel:
        kwargs["distributed_config"] = _shares(config, path)
    model = load_weights(
        auto_class,
        path,
        dtype=resolve_dtype(dtype),
        attn_implementation=NAME,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        **kwargs,
    )
    if not parallel:  # else each part is where it belongs
        model = model.to(resolve_device(device))  # type: ignore[arg-type]
    model = model.eval().requires_grad_(False)
    check_model(model)
    return model


def _shares(config: PreTrainedConfig, path: str | Path) -> DistributedConfig:
    """How transformers shares a model out: by its tensor parallel plan.

    Raises:
        ValueError: it has none, or its heads cannot be shared out evenly.
    """
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ValueError(f"{str(path)!r}: a {config.model_type} model has no tensor parallel plan")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    ranks = int(os.environ["WORLD_SIZE"])
    if heads % ranks:
        raise ValueError(
            f"{str(path)!r} has {heads} heads of keys and values; {ranks} ranks cannot share them "
            "evenly"
        )
    return DistributedConfig(tp_plan="auto")


def load_weights(
    auto_class: Any, path: str | Path, *, allow_pickle: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """``auto_class.from_pretrained`` that refuses to make up weights, without its bar.

    Args:
        auto_class: a transformers auto class; with a head where the checkpoint must have one.
        path: hub id, local path or packaged name.
        allow_pickle: also load weights that are not safetensors.
        kwargs: passed on.

    Raises:
        ValueError: for a missing or corrupt checkpoint, and for one that lacks weights of the
            model: transformers would fill them with random numbers. Tied weights may be absent.
    """
    where = locate(path)
    try:
        with _no_weights_bar():
            model, found = auto_class.from_pretrained(
                where,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                **kwargs,
            )
    except Exception as error:
        raise ValueError(f"cannot load model weights from {where!r}: {one_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"the weights in {where!r} are not all that a {type(model).__name__} has: "
            f"{missing[0]!r}{more} missing"
        )
    return model


@contextlib.contextmanager
def _no_weights_bar() -> Iterator[None]:
    """Hide the bar of transformers for a while, and leave those of the hub's downloads alone."""
    shown, hub_hidden = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    restore_hub = disable_progress_bars if hub_hidden else enable_progress_bars
    logging.disable_progress_bar()  # each of the two switches the hub's bars, too
    restore_hub()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
            restore_hub()


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config of a checkpoint: hub id, local path or packaged name.

    Raises:
        ValueError: when there is none, it cannot be read, or it is code and that is not trusted.
    """
    where = locate(path)
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
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
    holds(path, "tokenizer_config.json", "tokenizer")  # some are fine without; it must be there
    where = resolve(path)
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
    """An error's type and message on one line; a long message ends after a word."""
    message = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" …")
    return f"{type(error).__name__}: {message or 'no message'}"


def find_tokenizer(
    *paths: str | Path | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first path that has one; None if none has."""
    for path in paths:
        with contextlib.suppress(ValueError):
            if path:
                return load_tokenizer(path, trust_remote_code=trust_remote_code)
    return None
