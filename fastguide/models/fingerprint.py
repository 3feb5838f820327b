"""A short name for the weights of a model, so that what was made with it can say so."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

SAMPLE = 4096
"""Numbers of each tensor that are read; a few thousand tell two trainings apart."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """12 hexadecimal digits of names, shapes, dtypes and a sample of the weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        sample = whole.flatten()[:: max(1, weight.numel() // SAMPLE)]
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
