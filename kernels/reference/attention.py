"""Attention of the rows of a tree over the slots of a KV pool."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TreeLayout(NamedTuple):
    """Who sees whom in one pass of N packed rows that belong to R requests.

    A request's slots are those of its prefix, then one for each of its own rows, in their order.
    A row sees the first ``trunk`` slots of its request, and those from ``branch`` to its own: never
    a sibling, never a neighbour. So pending tokens are a chain (``trunk`` slots before it, and
    itself), and the rows of a candidate see prefix, chain and their own branch.
    """

    slots: Tensor
    """``[T]`` int32: slots of the KV pool; each request's lie side by side."""
    slot_starts: Tensor
    """``[R]`` int32: where each request's slots begin."""
    slot_counts: Tensor
    """``[R]`` int32: how many they are."""
    row_starts: Tensor
    """``[R + 1]`` int32: where each request's rows begin."""
    trunk: Tensor
    """``[N]`` int32: how many leading slots of its request the row sees."""
    branch: Tensor
    """``[N]`` int32: where, among its request's slots, the row's branch begins; from ``trunk`` to
    the index of the row's own slot."""
    max_slots: int
    """No request has more slots."""
    max_rows: int
    """No request has more rows."""


class DenseTree(NamedTuple):
    """A ``TreeLayout`` padded to ``[R, M]`` rows and ``[R, L]`` slots."""

    rows: Tensor
    """``[R, M]`` int64: index into the packed rows; padding repeats a row of the request."""
    valid: Tensor
    """``[R, M]`` bool: False where ``rows`` is padding."""
    slots: Tensor
    """``[R, L]`` int64; padding holds a slot of the same request (others may hold NaN, and
    0 * NaN is NaN) and is visible to no row."""
    visible: Tensor
    """``[R, M, L]`` bool."""


def dense_tree(layout: TreeLayout, window: int = 0) -> DenseTree:
    """Pad a layout, for implementations without ragged rows.

    Args:
        layout: see ``TreeLayout``.
        window: slots ``window`` or more positions before a row are invisible to it; 0 is none.
    """
    device = layout.slots.device
    row_starts, slot_starts = layout.row_starts.long(), layout.slot_starts.long()
    rows, slots = row_starts.diff()[:, None], layout.slot_counts.long()[:, None]
    m = torch.arange(layout.max_rows, device=device)[None]
    length = torch.arange(layout.max_slots, device=device)[None]
    row = row_starts[:-1, None] + torch.minimum(m, rows - 1)
    slot = slot_starts[:, None] + torch.where(length < slots, length, slots - 1)
    own = (slots - rows + m)[:, :, None]
    trunk, branch = layout.trunk.long()[row][:, :, None], layout.branch.long()[row][:, :, None]
    at = length[:, None]
    visible = (at < trunk) | ((at >= branch) & (at <= own))
    if window:
        position = torch.where(at < trunk, at, trunk + at - branch)
        visible &= trunk + own - branch - position < window
    valid = m < rows
    visible &= valid[:, :, None] & (at < slots[:, :, None])
    return DenseTree(row, valid, layout.slots.long()[slot], visible)


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: TreeLayout,
    *,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of packed tree rows over a KV pool, as a plain softmax over the visible slots.

    Args:
        query: ``[N, H, D]``.
        keys: ``[S, H_kv, D]``, H a multiple of H_kv; query head h reads key head h // (H / H_kv).
        values: ``[S, H_kv, E]``.
        layout: the pass's ``TreeLayout``; every request has a row, and a slot for each row.
        scaling: factor of the dot products.
        window: slots ``window`` or more positions back are not seen (sliding window); 0 is none.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma-2); 0 is none.

    Returns:
        ``[N, H, E]`` in the dtype of ``query``; the arithmetic is fp32, or fp64 for fp64 inputs.
    """
    dense = dense_tree(layout, window)
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // keys.shape[1]
    q = query[dense.rows].to(wide).transpose(1, 2)  # [R, H, M, D]
    k = keys[dense.slots].to(wide).transpose(1, 2).repeat_interleave(groups, dim=1)
    v = values[dense.slots].to(wide).transpose(1, 2).repeat_interleave(groups, dim=1)
    logits = q @ k.transpose(-1, -2) * scaling  # [R, H, M, L]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    probs = torch.softmax(logits.masked_fill(~dense.visible[:, None], float("-inf")), dim=-1)
    out = (probs @ v).transpose(1, 2).to(query.dtype)  # [R, M, H, E]
    result = query.new_empty(query.shape[0], query.shape[1], values.shape[2])
    result[dense.rows[dense.valid]] = out[dense.valid]
    return result
