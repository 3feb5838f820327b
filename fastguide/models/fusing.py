"""Fuse the small operations of a model's layers: norms and MLPs through ``torch.compile``."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

ATTENTION = ("attn", "attention")
"""How the names of a layer's attention end."""


def fuse(model: PreTrainedModel) -> int:
    """Compile all of a decoder's layers but their attention, and the norm that follows them.

    Where a norm is half a dozen kernels it becomes one; so do an MLP's activation and product.
    Attention stays as it is: its layout differs from pass to pass, and its hot part is a kernel
    already. The first passes take longer: code is made for one row, and for any number of them.

    Args:
        model: a causal LM or a bare backbone.

    Returns:
        how many modules are compiled.
    """
    count = model.config.get_text_config().num_hidden_layers
    parents = [
        (parent, layers)
        for parent in model.modules()
        for layers in parent.children()
        if isinstance(layers, nn.ModuleList) and len(layers) == count
    ]
    parts: list[nn.Module] = []
    for parent, layers in parents:
        for layer in layers:
            parts += [c for n, c in layer.named_children() if not n.endswith(ATTENTION)]
        parts += [c for c in parent.children() if "norm" in type(c).__name__.lower()]
    for part in parts:
        # The bound method, not the module: parameters keep their names, for who reads them later.
        part.forward = torch.compile(part.forward)
    return len(parts)
