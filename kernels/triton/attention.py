"""Attention of the rows of trees over the slots of a KV pool, each key and value read once.

Formula: ``out[n] = sum_j softmax_j(scaling * q[n] . k[slot_j]) v[slot_j]``, the logits capped where
a model does so, over the slots that row n sees: the first ``trunk`` of its request and those from
``branch`` to its own, within the window.

Bytes: ``H_kv (D + E)`` per slot of a request and block of its rows; queries and outputs once; where
the slots are split also ``4 (E + 1) N H splits`` of partial results, written and read.

The query heads of a KV head, for all rows of a request, are the rows of one matrix product: a
request with 20 candidates reads its prefix once, not 20 times. One walk covers prefix, pending
tokens and branches, since a request's slots include its own rows; which of them a row sees is
arithmetic on two numbers, so no mask is read, and slots that all rows see take none.

Specification: ``reference.tree_attention``. Test: ``tests/kernels/test_attention.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguide.kernels import tuning
from fastguide.kernels.reference import TreeLayout

from .product import multiply_add

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    size = (1 - decay) / (1 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def _load(pool, j, end):
    """Keys ``[N, D]`` and values ``[N, E]`` of the request's slots ``j``, below ``end``."""
    table, keys_ptr, values_ptr, size, key_slot_stride, value_slot_stride, in_d, in_e = pool
    slots_ptr, slot_start, table_size = table
    listed = (j < end) & (slot_start + j >= 0) & (slot_start + j < table_size)
    slot = tl.load(slots_ptr + slot_start + j, mask=listed, other=-1)
    stored = ((slot >= 0) & (slot < size))[:, None]
    slot = slot.to(tl.int64)[:, None]
    key = tl.load(keys_ptr + slot * key_slot_stride, mask=stored & in_d, other=0.0)
    value = tl.load(values_ptr + slot * value_slot_stride, mask=stored & in_e, other=0.0)
    return key, value


@triton.jit
def _logits(query, key, scaling, softcap, SOFTCAP: tl.constexpr):
    """Logits ``[M, N]``, to the base 2."""
    products = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    products = multiply_add(query, tl.trans(key), products)
    if SOFTCAP:
        return softcap * LOG2E * _tanh(products * (scaling / softcap))
    else:
        return products * (scaling * LOG2E)


@triton.jit
def _attend(logits, value, high, total, mixed):
    """One step of an online softmax."""
    raised = tl.maximum(high, tl.max(logits, 1))
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    weight = tl.exp2(logits - finite[:, None])
    fade = tl.exp2(high - finite)
    total = total * fade + tl.sum(weight, 1)
    mixed = multiply_add(weight.to(value.dtype), value, mixed * fade[:, None])
    return raised, total, mixed


@triton.jit
def _tree_attention_kernel(
    out_ptr,  # [N, H, E]; of parts, [N, H, SPLITS, E] fp32
    lse_ptr,  # of parts, [N, H, SPLITS] fp32, to the base 2
    query_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    slot_starts_ptr,
    slot_counts_ptr,
    row_starts_ptr,
    trunk_ptr,
    branch_ptr,
    scaling,
    softcap,
    window,
    rows_in_all,
    table_size,
    size,
    kv_heads,
    query_row_stride,
    query_head_stride,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    D: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    request, head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    split = tl.program_id(2)
    row_start, slot_start = tl.load(row_starts_ptr + request), tl.load(slot_starts_ptr + request)
    rows = tl.load(row_starts_ptr + request + 1) - row_start
    slots = tl.load(slot_counts_ptr + request)
    if tl.program_id(1) * BLOCK_M >= rows * GROUP:
        return
    # Line m of the block is query head m % GROUP of the KV head, in row m // GROUP of the request.
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = row_start + m // GROUP
    real = (m < rows * GROUP) & (row >= 0) & (row < rows_in_all)
    query_head = head * GROUP + m % GROUP
    trunk = tl.load(trunk_ptr + row, mask=real, other=0)
    branch = tl.load(branch_ptr + row, mask=real, other=0)
    own = tl.where(real, slots - rows + m // GROUP, -1)

    # Slots [begin, end) hold all that the block sees; this program takes its share of them.
    end = tl.max(own, 0) + 1
    begin = 0
    if WINDOW:
        oldest = tl.where(real, trunk + own - branch, end) - window + 1
        begin = tl.maximum(tl.min(oldest, 0), 0)
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), SPLITS) * BLOCK_N
    begin += split * share
    end = tl.minimum(begin + share, end)
    seen_by_all = begin
    if not WINDOW:
        shortest = tl.minimum(tl.min(tl.where(real, trunk, end), 0), end)
        seen_by_all += tl.maximum(shortest - begin, 0) // BLOCK_N * BLOCK_N

    d, e = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_E)[None, :]
    at = row.to(tl.int64) * query_row_stride + query_head * query_head_stride
    query = tl.load(query_ptr + at[:, None] + d, mask=real[:, None] & (d < D), other=0.0)
    keys_ptr += head.to(tl.int64) * key_head_stride + d
    values_ptr += head.to(tl.int64) * value_head_stride + e
    table = (slots_ptr, slot_start, table_size)
    pool = (table, keys_ptr, values_ptr, size, key_slot_stride, value_slot_stride, d < D, e < E)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(begin, seen_by_all, BLOCK_N):
        key, value = _load(pool, start + tl.arange(0, BLOCK_N), end)
        logits = _logits(query, key, scaling, softcap, SOFTCAP)
        high, total, mixed = _attend(logits, value, high, total, mixed)
    for start in range(seen_by_all, end, BLOCK_N):
        key, value = _load(pool, start + tl.arange(0, BLOCK_N), end)
        logits = _logits(query, key, scaling, softcap, SOFTCAP)
        j = start + tl.arange(0, BLOCK_N)[None, :]
        in_trunk = j < trunk[:, None]
        visible = in_trunk | ((j >= branch[:, None]) & (j <= own[:, None]))
        visible &= j < end
        if WINDOW:
            back = own[:, None] - j + tl.where(in_trunk, (trunk - branch)[:, None], 0)
            visible &= back < window
        logits = tl.where(visible, logits, float("-inf"))
        high, total, mixed = _attend(logits, value, high, total, mixed)

    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    at = (row.to(tl.int64) * (kv_heads * GROUP) + query_head) * SPLITS + split
    place = out_ptr + at[:, None] * E + e
    tl.store(place, mixed.to(out_ptr.dtype.element_ty), mask=real[:, None] & (e < E))
    if SPLITS > 1:
        tl.store(lse_ptr + at, high + tl.log2(total), mask=real)


@triton.jit
def _merge_kernel(
    out_ptr,
    parts_ptr,  # [N H, SPLITS, E]
    lse_ptr,  # [N H, SPLITS]
    E: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    split, e = tl.arange(0, SPLITS)[:, None], tl.arange(0, BLOCK_E)[None, :]
    lse = tl.load(lse_ptr + line * SPLITS + split)
    share = tl.exp2(lse - tl.max(lse, 0))
    parts = tl.load(parts_ptr + (line * SPLITS + split) * E + e, mask=e < E, other=0.0)
    mixed = tl.sum(parts * (share / tl.sum(share, 0)), 0)
    e = tl.arange(0, BLOCK_E)
    tl.store(out_ptr + line * E + e, mixed.to(out_ptr.dtype.element_ty), mask=e < E)


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
    """``reference.tree_attention`` for fp32, bf16 and fp16, head sizes up to 256.

    Sums are fp32; probabilities are rounded to the type of the values before they multiply them.
    What a broken layout points at outside the tensors is neither read nor written: such a slot
    counts as one of zeros.
    """
    query, keys, values = (t if t.stride(2) == 1 else t.contiguous() for t in (query, keys, values))
    rows, heads, d = query.shape
    size, kv_heads, e = values.shape
    out = torch.empty(rows, heads, e, dtype=query.dtype, device=query.device)
    if rows == 0:
        return out
    requests, group = layout.row_starts.shape[0] - 1, heads // kv_heads
    plan = tuning.attention(
        requests * kv_heads, layout.max_rows * group, layout.max_slots, max(d, e), query
    )
    parts = lse = out
    if plan.splits > 1:
        shape = (rows, heads, plan.splits)
        parts = torch.empty(*shape, e, dtype=torch.float32, device=query.device)
        lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        _tree_attention_kernel[requests * kv_heads, plan.row_blocks, plan.splits](
            parts,
            lse,
            query,
            keys,
            values,
            *(t.contiguous() for t in layout[:6]),
            float(scaling),
            float(softcap),
            window,
            rows,
            layout.slots.shape[0],
            size,
            kv_heads,
            *query.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
            D=d,
            E=e,
            GROUP=group,
            SPLITS=plan.splits,
            WINDOW=window > 0,
            SOFTCAP=softcap != 0,
            BLOCK_M=plan.block_m,
            BLOCK_N=plan.block_n,
            BLOCK_D=max(16, tuning.power_of_two(d)),
            BLOCK_E=max(16, tuning.power_of_two(e)),
            num_warps=plan.warps,
            num_stages=plan.stages,
            enable_fp_fusion=True,
        )
        if plan.splits > 1:
            _merge_kernel[(rows * heads,)](
                out,
                parts,
                lse,
                E=e,
                SPLITS=plan.splits,
                BLOCK_E=tuning.power_of_two(e),
                num_warps=1 if plan.splits * e <= 1024 else 4,
                enable_fp_fusion=True,
            )
    return out
