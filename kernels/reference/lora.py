"""LoRA adapters on segments of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_rows(base: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: Tensor) -> Tensor:
    """Add LoRA adapters to a linear layer's output, each on its own segment of the rows.

    ``out[n] = base[n] + B_g (A_g x[n])`` for ``segments[g] <= n < segments[g + 1]``; rows before
    the first and after the last segment are the base model's and stay as they are.

    Args:
        base: ``[N, O]``, the layer's output without adapters.
        x: ``[N, I]``, its input.
        a: ``[G, r, I]``, one per adapter.
        b: ``[G, O, r]``, with the adapter's scaling folded in.
        segments: ``[G + 1]`` int32, ascending, 0 to N.

    Returns:
        ``[N, O]`` in the dtype of ``base``; sums are fp32 (fp64 for fp64 inputs), and ``A_g x``
        is not rounded in between.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    rows = torch.arange(base.shape[0], device=base.device)[:, None]
    out = base.to(wide)
    for g in range(a.shape[0]):
        mine = (rows >= segments[g]) & (rows < segments[g + 1])
        shrunk = x.to(wide) @ a[g].to(wide).T
        out = torch.where(mine, out + shrunk @ b[g].to(wide).T, out)
    return out.to(base.dtype).contiguous()
