"""Weights in 4 or 8 bits: of backbones to train on, and of models that decode."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

SCHEMES = ("int8", "int4")


def quantization(scheme: str) -> Any:
    """A quantization config of transformers: bitsandbytes where it is installed, else torchao.

    Args:
        scheme: ``int8`` or ``int4``, of the weights; ``int4`` takes bitsandbytes.

    Raises:
        ValueError: another scheme.
        ImportError: no library for it is installed.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantization is {scheme!r}; allowed are {', '.join(SCHEMES)}")
    if find_spec("bitsandbytes"):
        from transformers import BitsAndBytesConfig

        if scheme == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if scheme == "int4":
        raise ImportError("an int4 backbone needs bitsandbytes: pip install bitsandbytes")
    if find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    raise ImportError(
        "an int8 backbone needs torchao or bitsandbytes: pip install 'fastguide[quantize]'"
    )


DECODING = ("int8", "fp8", "int4")
"""What ``shrink`` knows; int4 needs a CUDA device and bf16."""


def check_scheme(scheme: str | None) -> None:
    """Refuse what ``shrink`` does not know.

    Raises:
        ValueError: naming what is allowed.
        ImportError: torchao is not installed.
    """
    if scheme is None:
        return
    if scheme not in DECODING:
        raise ValueError(f"quantize is {scheme!r}; allowed are {', '.join(DECODING)} and None")
    if not find_spec("torchao"):
        raise ImportError(f"quantize={scheme!r} needs torchao: pip install 'fastguide[quantize]'")


def shrink(model: PreTrainedModel, scheme: str | None) -> None:
    """Quantize the weights of a loaded model's linear layers, its head left out; None leaves it.

    Products stay in the model's dtype. The model can no longer be trained or saved.

    Args:
        model: on its device, in its dtype.
        scheme: one of ``DECODING``: 8-bit integers per row, 8-bit floats, 4-bit integers in groups.

    Raises:
        ValueError: an unknown scheme, or one that this device or dtype cannot have.
        ImportError: torchao is not installed.
    """
    check_scheme(scheme)
    if scheme is None:
        return
    from torchao import quantization as torchao

    if scheme == "int4" and (model.device.type != "cuda" or model.dtype != torch.bfloat16):
        raise ValueError(
            f"quantize is 'int4', of {model.dtype} on {model.device}; allowed is bfloat16 on cuda"
        )
    config: Any = {
        "int8": lambda: torchao.Int8WeightOnlyConfig(set_inductor_config=False),
        "fp8": lambda: torchao.Float8WeightOnlyConfig(set_inductor_config=False),
        "int4": lambda: torchao.Int4WeightOnlyConfig(
            set_inductor_config=False, int4_packing_format="tile_packed_to_4d"
        ),
    }[scheme]()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module is not head

    torchao.quantize_(model, config, filter_fn=chosen)
