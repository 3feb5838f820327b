"""What the ops refuse: one sentence with the argument, what was received and what is allowed.

Only what can be told without reading a tensor's content: nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What logits, keys, values and weights may be."""

_INT32, _INT64, _FP32, _FP64 = (torch.int32,), (torch.int64,), (torch.float32,), (torch.float64,)


def topk_logsumexp(logits: Tensor, k: int, inv_temperature: Tensor) -> None:
    """See ``reference.topk_logsumexp``."""
    _logits(logits, inv_temperature)
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")


def guide_sample(
    logits: Tensor,
    inv_temperature: Tensor,
    values: Tensor,
    ids: Tensor,
    lse: Tensor,
    scores: Tensor,
    guide_weights: Tensor,
    *,
    count: Tensor,
    mode: Tensor,
    scale: Tensor,
    weight: Tensor,
    seed: Tensor,
    position: Tensor,
) -> None:
    """See ``reference.guide_sample``."""
    _logits(logits, inv_temperature)
    device, rows = logits.device, logits.shape[0]
    if values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"values must be [N, K] with K at least 1, not {list(values.shape)}.")
    if scores.ndim != 3:
        raise ValueError(f"scores must be [G, N, K], not {list(scores.shape)}.")
    width, guides = values.shape[1], scores.shape[0]
    _tensor("values", values, (rows, width), _FP32 + _FP64, device)
    _tensor("ids", ids, (rows, width), _INT32, device)
    _tensor("lse", lse, (rows,), _FP64, device)
    _tensor("scores", scores, (guides, rows, width), _FP32 + _FP64, device)
    _tensor("guide_weights", guide_weights, (guides, rows), _FP64, device)
    _tensor("count", count, (rows,), _INT32, device)
    _tensor("mode", mode, (rows,), _INT32, device)
    _tensor("scale", scale, (rows,), _FP64, device)
    _tensor("weight", weight, (rows,), _FP64, device)
    _tensor("seed", seed, (rows,), _INT64, device)
    _tensor("position", position, (rows,), _INT64, device)


def sample_tail(logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor) -> None:
    """See ``reference.sample_tail``."""
    _logits(logits, inv_temperature)
    _tensor("count", count, logits.shape[:1], _INT32 + _INT64, logits.device)
    _tensor("fraction", fraction, logits.shape[:1], _FP64, logits.device)


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    slot_starts: Tensor,
    slot_counts: Tensor,
    row_starts: Tensor,
    trunk: Tensor,
    branch: Tensor,
    max_slots: int,
    max_rows: int,
    window: int,
    softcap: float,
) -> None:
    """See ``reference.tree_attention``; the fields of the layout one by one."""
    for name, tensor, shape in (
        ("query", query, "[N, H, D]"),
        ("keys", keys, "[S, H_kv, D]"),
        ("values", values, "[S, H_kv, E]"),
    ):
        if tensor.ndim != 3 or min(tensor.shape[1:]) < 1:
            raise ValueError(f"{name} must be {shape}, not {list(tensor.shape)}.")
    rows, heads, width = query.shape
    size, kv_heads = keys.shape[:2]
    device, dtypes = query.device, (query.dtype,)
    _tensor("query", query, query.shape, FLOATS, device)
    _tensor("keys", keys, (size, kv_heads, width), dtypes, device)
    _tensor("values", values, (size, kv_heads, values.shape[2]), dtypes, device)
    if heads % kv_heads:
        raise ValueError(
            f"query must have a multiple of the {kv_heads} heads of keys, not {heads}."
        )
    _tensor("layout.slots", slots, (slots.numel(),), _INT32, device)
    _tensor("layout.row_starts", row_starts, (max(1, row_starts.numel()),), _INT32, device)
    requests = row_starts.shape[0] - 1
    _tensor("layout.slot_starts", slot_starts, (requests,), _INT32, device)
    _tensor("layout.slot_counts", slot_counts, (requests,), _INT32, device)
    _tensor("layout.trunk", trunk, (rows,), _INT32, device)
    _tensor("layout.branch", branch, (rows,), _INT32, device)
    if rows > 0 and requests < 1:
        raise ValueError(f"layout must have at least 1 request for its {rows} rows, not 0.")
    if rows > 0 and not -(-rows // requests) <= max_rows <= rows:
        raise ValueError(
            f"layout.max_rows must be {-(-rows // requests)} to {rows} for {rows} rows of "
            f"{requests} requests, not {max_rows}."
        )
    if rows > 0 and max_slots < max_rows:
        raise ValueError(
            f"layout.max_slots must be at least max_rows, {max_rows}, not {max_slots}."
        )
    if window < 0:
        raise ValueError(f"window must be at least 0 (none), not {window}.")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be finite and at least 0 (none), not {softcap}.")


def lora_rows(base: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: Tensor) -> None:
    """See ``reference.lora_rows``."""
    for name, tensor, shape in (("base", base, "[N, O]"), ("x", x, "[N, I]")):
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be {shape}, not {list(tensor.shape)}.")
    if a.ndim != 3 or min(a.shape) < 1:
        raise ValueError(f"a must be [G, r, I], each at least 1, not {list(a.shape)}.")
    device, dtypes = base.device, (base.dtype,)
    (rows, out), (guides, rank) = base.shape, a.shape[:2]
    _tensor("base", base, base.shape, FLOATS, device)
    _tensor("x", x, (rows, a.shape[2]), dtypes, device)
    _tensor("a", a, a.shape, dtypes, device)
    _tensor("b", b, (guides, out, rank), dtypes, device)
    _tensor("segments", segments, (guides + 1,), _INT32, device)


def td_lambda(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float) -> None:
    """See ``reference.td_lambda``."""
    if values.ndim != 2:
        raise ValueError(f"values must be [B, T], not {list(values.shape)}.")
    _tensor("values", values, values.shape, FLOATS, values.device)
    _tensor("rewards", rewards, values.shape, (values.dtype,), values.device)
    _tensor("mask", mask, values.shape, (torch.bool,), values.device)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be from 0 to 1, not {number}.")


def _logits(logits: Tensor, inv_temperature: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be [N, V] with V at least 1, not {list(logits.shape)}.")
    _tensor("logits", logits, logits.shape, FLOATS, logits.device)
    allowed = _FP32 + _FP64 if logits.dtype == torch.float64 else _FP32
    _tensor("inv_temperature", inv_temperature, logits.shape[:1], allowed, logits.device)


def _tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}.")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must be {allowed}, not {str(tensor.dtype).removeprefix('torch.')}."
        )
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not on {tensor.device}.")
