"""Backbones in 8 bits: values, and gradients of what lies on top."""

from __future__ import annotations

import pytest
import torch

from fastguide.models import quantization
from fastguide.models.value import ValueModel


def test_an_int8_backbone_trains_a_lora() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    scheme = quantization.quantization("int8")
    small = ValueModel.create("stories", lora_rank=4, quantization=scheme)
    whole = ValueModel.create("stories", lora_rank=4)
    ids = torch.tensor([[0, 5, 9, 300]])
    for model in (small, whole):
        torch.nn.init.ones_(model.head.weight)
    torch.testing.assert_close(small(ids), whole(ids), rtol=0.1, atol=0.5)
    small(ids).sum().backward()
    trained = [p for p in small.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


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
