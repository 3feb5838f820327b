"""LoRA adapters on segments of rows, shrink and expand in one launch.

Formula: ``out[n] = base[n] + B_g (A_g x[n])`` for the rows of segment g; other rows are copied.

Bytes: ``base``, ``out`` and ``B`` once; ``x`` and ``A`` once for each block of output columns,
after the first from the L2 cache. At few rows that is cheaper than a second launch and its gap.

A program owns a block of rows and of output columns. For each adapter that its rows meet (mostly
one) it shrinks them to a block of ranks, in fp32 registers, and adds their expansion.

Specification: ``reference.lora_rows``. Test: ``tests/kernels/test_lora.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguide.kernels import tuning

from .product import multiply_add


@triton.jit(do_not_specialize=["rows", "adapters"])
def _lora_rows_kernel(
    out_ptr,
    base_ptr,
    x_ptr,
    a_ptr,
    b_ptr,
    segments_ptr,
    rows,
    width,
    outs,
    adapters,
    rank,
    base_row_stride,
    x_row_stride,
    a_adapter_stride,
    a_rank_stride,
    b_adapter_stride,
    b_out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    EXPAND: tl.constexpr = "ieee" if b_ptr.dtype.element_ty == tl.float32 else "tf32x3"
    first_row = tl.program_id(0) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    n, i = row.to(tl.int64)[:, None], tl.arange(0, BLOCK_I)
    inside = (row < rows)[:, None] & (o < outs)[None, :]
    total = tl.load(base_ptr + n * base_row_stride + o[None, :], mask=inside, other=0.0)
    total = total.to(tl.float32)
    for g in range(adapters):
        begin, end = tl.load(segments_ptr + g), tl.load(segments_ptr + g + 1)
        if (begin < first_row + BLOCK_M) & (end > first_row):
            mine = ((row >= begin) & (row < end) & (row < rows))[:, None]
            for first_rank in range(0, rank, BLOCK_R):
                r = first_rank + tl.arange(0, BLOCK_R)
                x_at = x_ptr + n * x_row_stride + i[None, :]
                a_at = a_ptr + (r.to(tl.int64) * a_rank_stride)[None, :] + i[:, None]
                shrunk = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
                for start in range(0, width, BLOCK_I):
                    real = i < width - start
                    x = tl.load(x_at + start, mask=mine & real[None, :], other=0.0)
                    a = tl.load(a_at + start, mask=(r < rank)[None, :] & real[:, None], other=0.0)
                    shrunk = multiply_add(x, a, shrunk)
                b = tl.load(
                    b_ptr + (o.to(tl.int64) * b_out_stride)[None, :] + r[:, None],
                    mask=(o < outs)[None, :] & (r < rank)[:, None],
                    other=0.0,
                )
                # The shrunk rows keep their precision; three products on tensor cores do that.
                added = tl.dot(shrunk, b.to(tl.float32), input_precision=EXPAND)
                total += tl.where(mine, added, 0.0)
        a_ptr += a_adapter_stride
        b_ptr += b_adapter_stride
    tl.store(out_ptr + n * outs + o[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


def lora_rows(base: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: Tensor) -> Tensor:
    """``reference.lora_rows`` for fp32, bf16 and fp16."""
    base, x, a, b = (t if t.stride(-1) == 1 else t.contiguous() for t in (base, x, a, b))
    (rows, outs), width, (adapters, rank) = base.shape, x.shape[1], a.shape[:2]
    out = torch.empty(rows, outs, dtype=base.dtype, device=base.device)
    if rows == 0 or outs == 0:
        return out
    plan = tuning.lora(base, rank)
    grid = (-(-rows // plan.block_m), -(-outs // plan.block_o))
    with torch.cuda.device_of(base):
        _lora_rows_kernel[grid](
            out,
            base,
            x,
            a,
            b,
            segments.contiguous(),
            rows,
            width,
            outs,
            adapters,
            rank,
            base.stride(0),
            x.stride(0),
            *a.stride()[:2],
            *b.stride()[:2],
            BLOCK_M=plan.block_m,
            BLOCK_I=plan.block_i,
            BLOCK_O=plan.block_o,
            BLOCK_R=plan.block_r,
            num_warps=plan.warps,
            num_stages=plan.stages,
            enable_fp_fusion=True,
        )
    return out
