"""Backbones in 4 or 8 bits, through the libraries that transformers knows for it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

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
        import torch
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
