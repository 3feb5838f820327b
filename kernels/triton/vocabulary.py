"""The top of a row with its log-sum-exp, in one read of the logits.

Formula: ``z = logits * inv_temperature``; the k largest ``z`` by (logit, lower id), and
``A = log sum_j exp(z_j)``.

Bytes: the ``N V`` logits once, and ``12 k N + 8 N`` of output; where a row is split, also
``8 (K + 1) N splits`` of partial results, written and read (``K``: k up to a power of two).

A program walks its part of a row in tiles of ``LANES`` vectors of 16 bytes. A lane, one place in
the tile, keeps its largest logit and the tile that held it: one comparison per vector. The k
largest elements lie in the k lanes with the largest maxima, and there in the k vectors with the
largest maxima, since an element left out has k larger ones outside its lane (its vector). So two
small sorts and a second look at k lanes and k vectors, which are still in a cache, give the exact
top k of every input, ties included, without a loop that depends on the data.

Specification: ``reference.topk_logsumexp``. Test: ``tests/kernels/test_vocabulary.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguide.kernels import tuning

from .order import (
    LEAST_KEY,
    largest,
    narrow_index,
    narrow_key,
    narrow_logit,
    wide_index,
    wide_key,
    wide_logit,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _fold(x, tile, inv_temperature, best, best_tile, high, total):
    """Take a tile ``[UNROLL, WIDTH, VECTOR]`` into the lanes and into one log-sum-exp per thread.

    ``high`` is the largest ``z`` so far and ``total`` the sum of ``exp(z - high)``. Differences
    are taken of rounded ``z``, so that a row with all its mass on one token has that ``z`` as its
    log-sum-exp to the last bit (the launch therefore forbids fusing the product into them).
    """
    x = x.to(tl.float32)
    lane_max = tl.max(x, 2)
    better = lane_max > best  # strict: of equal logits the first tile's, hence the lower id
    best = tl.where(better, lane_max, best)
    best_tile = tl.where(better, tile, best_tile)
    raised = tl.maximum(high, tl.max(lane_max, 0) * inv_temperature)
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    mass = tl.exp2((x * inv_temperature - finite[None, :, None]) * LOG2E)
    total = total * tl.exp2((high - finite) * LOG2E) + tl.sum(tl.sum(mass, 2), 0)
    return best, best_tile, raised, total


@triton.jit
def _write(values_ptr, ids_ptr, keys, inv_temperature, row, k, K: tl.constexpr):
    rank = tl.arange(0, K)
    padding = keys == LEAST_KEY
    z = tl.where(padding, float("-inf"), wide_logit(keys) * inv_temperature)
    ids = tl.where(padding, -1, wide_index(keys)).to(tl.int32)
    tl.store(values_ptr + row * k + rank, z, mask=rank < k)
    tl.store(ids_ptr + row * k + rank, ids, mask=rank < k)


@triton.jit
def _load(logits_ptr, at, first, end, column_stride):
    """The elements at ``at``, -inf outside [first, end)."""
    real = (at >= first) & (at < end)
    return tl.load(logits_ptr + at * column_stride, mask=real, other=float("-inf"))


@triton.jit(do_not_specialize=["k", "splits"])
def _scan_kernel(
    values_ptr,
    ids_ptr,
    lse_ptr,  # [N, splits] fp64
    keys_ptr,  # [N, splits, K] int64
    logits_ptr,
    inv_temperature_ptr,
    k,
    splits,
    part,
    vocab,
    row_stride,
    column_stride,
    inv_temperature_stride,
    K: tl.constexpr,
    TILES: tl.constexpr,
    SHIFTED: tl.constexpr,
    NARROW: tl.constexpr,
    MERGED: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    LANES: tl.constexpr = UNROLL * WIDTH
    TILE: tl.constexpr = LANES * VECTOR
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = split * part
    column_stride = tl.cast(column_stride, tl.int64)  # a transposed matrix may span 2**31 elements
    inv_temperature = tl.load(inv_temperature_ptr + row * inv_temperature_stride)
    # The part is the elements [first, end) from a multiple of 16 bytes on.
    logits_ptr += row * row_stride + start * column_stride
    first = 0
    if SHIFTED:
        first = (logits_ptr.to(tl.int64) % 16).to(tl.int32) // (dtype.primitive_bitwidth // 8)
        logits_ptr = tl.multiple_of(logits_ptr - first, 16)
    end = first + tl.minimum(vocab - start, part)

    # Neighbouring threads hold neighbouring vectors, and each thread has UNROLL of them in flight.
    lane = tl.arange(0, UNROLL)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = tl.arange(0, VECTOR)
    offset = lane[:, :, None] * VECTOR + inside
    best = tl.full([UNROLL, WIDTH], float("-inf"), tl.float32)
    best_tile = tl.zeros([UNROLL, WIDTH], tl.int32)
    high = tl.full([WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    # Tiles inside the part need no mask, so that their loads are 16 bytes wide in every row.
    whole = end // TILE
    if SHIFTED:
        x = _load(logits_ptr, offset, first, end, column_stride)
        best, best_tile, high, total = _fold(x, 0, inv_temperature, best, best_tile, high, total)
    for tile in range(SHIFTED, whole):
        x = tl.load(logits_ptr + (offset + tile * TILE) * column_stride)
        best, best_tile, high, total = _fold(x, tile, inv_temperature, best, best_tile, high, total)
    if (whole >= SHIFTED) & (whole * TILE < end):
        x = _load(logits_ptr, offset + whole * TILE, first, end, column_stride)
        best, best_tile, high, total = _fold(
            x, whole, inv_temperature, best, best_tile, high, total
        )

    highest = tl.max(high, 0)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    share = total * tl.exp2((high - finite) * LOG2E)
    lse = finite.to(tl.float64) + tl.log(tl.sum(share.to(tl.float64), 0))
    tl.store(lse_ptr + row * splits + split, lse)

    # The K best lanes. With the unrolled dimension innermost, the first steps of the sort stay
    # within a thread.
    vector = best_tile * LANES + lane
    keys = tl.reshape(tl.trans(narrow_key(best, vector, dtype)), [LANES])
    vector = narrow_index(largest(keys, K), dtype)
    if TILES > 1:  # the K best vectors of these lanes
        vector = (vector % LANES)[:, None] + tl.arange(0, TILES)[None, :] * LANES
        at = vector[:, :, None] * VECTOR + inside
        x = _load(logits_ptr, at, first, end, column_stride)
        keys = narrow_key(tl.max(x.to(tl.float32), 2), vector, dtype)
        vector = narrow_index(largest(tl.reshape(keys, [K * TILES]), K), dtype)
    at = vector[:, None] * VECTOR + inside[None, :]
    x = _load(logits_ptr, at, first, end, column_stride).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))  # a NaN may sort anywhere, but before the padding
    real = (at >= first) & (at < end)
    if NARROW:  # the indices of the part fit into 16 bits
        keys = tl.where(real, narrow_key(x, at, dtype), -(2**31))
        keys = largest(tl.reshape(keys, [K * VECTOR]), K)
        x, at, real = narrow_logit(keys, dtype), narrow_index(keys, dtype), keys != -(2**31)
        keys = tl.where(real, wide_key(x, start + at - first), LEAST_KEY)
    else:
        keys = tl.where(real, wide_key(x, start + at - first), LEAST_KEY)
        keys = largest(tl.reshape(keys, [K * VECTOR]), K)
    if MERGED:
        # Every other part is written in reverse: the runs that the merge starts from.
        rank = tl.arange(0, K)
        place = tl.where(split % 2 == 0, rank, K - 1 - rank)
        tl.store(keys_ptr + (row * splits + split) * K + place, keys)
    else:
        _write(values_ptr, ids_ptr, keys, inv_temperature, row, k, K)


@triton.jit(do_not_specialize=["k", "splits"])
def _merge_kernel(
    values_ptr,
    ids_ptr,
    lse_ptr,
    keys_ptr,
    part_lse_ptr,
    inv_temperature_ptr,
    k,
    splits,
    inv_temperature_stride,
    K: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, not below splits
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SPLITS * K)
    keys = tl.load(keys_ptr + row * splits * K + place, mask=place < splits * K, other=LEAST_KEY)
    keys = largest(keys, K, SORTED=True)
    inv_temperature = tl.load(inv_temperature_ptr + row * inv_temperature_stride)
    _write(values_ptr, ids_ptr, keys, inv_temperature, row, k, K)

    split = tl.arange(0, SPLITS)
    part = tl.load(part_lse_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    highest = tl.max(part, 0)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(lse_ptr + row, finite + tl.log(tl.sum(tl.exp(part - finite), 0)))


def topk_logsumexp(
    logits: Tensor, k: int, inv_temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.topk_logsumexp`` for fp32, bf16 and fp16, k up to ``tuning.MAX_COLUMNS``.

    The log-sum-exp may differ by about 1e-7 with the number of rows, which decides how a row is
    split; values and ids never do. It is fastest where the vocabulary is contiguous and rows begin
    at multiples of 16 bytes.
    """
    rows, vocab = logits.shape
    device = logits.device
    values = torch.empty(rows, k, dtype=torch.float32, device=device)
    ids = torch.empty(rows, k, dtype=torch.int32, device=device)
    lse = torch.empty(rows, dtype=torch.float64, device=device)
    if rows == 0:
        return values, ids, lse
    # Triton knows of an alignment from arguments that are multiples of 16.
    shifted = logits.stride(1) == 1 and (logits.data_ptr() % 16 or logits.stride(0) % 16) != 0
    plan = tuning.scan(logits, k, shifted)
    keys, part_lse = values, lse
    if plan.splits > 1:
        keys = torch.empty(rows, plan.splits, plan.columns, dtype=torch.int64, device=device)
        part_lse = torch.empty(rows, plan.splits, dtype=torch.float64, device=device)
    with torch.cuda.device_of(logits):
        _scan_kernel[rows, plan.splits](
            values,
            ids,
            part_lse,
            keys,
            logits,
            inv_temperature,
            k,
            plan.splits,
            plan.part,
            vocab,
            logits.stride(0),
            logits.stride(1),
            inv_temperature.stride(0),
            K=plan.columns,
            TILES=plan.tiles,
            SHIFTED=shifted,
            NARROW=plan.part <= 65536 and logits.dtype != torch.float32,
            MERGED=plan.splits > 1,
            UNROLL=tuning.UNROLL,
            WIDTH=32 * plan.warps,
            VECTOR=plan.vector,
            num_warps=plan.warps,
            enable_fp_fusion=False,
        )
        if plan.splits > 1:
            _merge_kernel[(rows,)](
                values,
                ids,
                lse,
                keys,
                part_lse,
                inv_temperature,
                k,
                plan.splits,
                inv_temperature.stride(0),
                K=plan.columns,
                SPLITS=tuning.power_of_two(plan.splits),
                num_warps=plan.merge_warps,
                enable_fp_fusion=False,
            )
    return values, ids, lse
