"""A draw from the tokens outside the candidates, for the few rows that need it.

Formula: of the tokens that rank below the last candidate, by (descending logit, lower id), the
first at which the cumulative mass exceeds ``fraction`` of the mass of them all.

Bytes: rows that draw are read 6 to 12 times (16 bits) or 8 to 20 times (fp32), after the first time
from the L2 cache; other rows are not read.

Instead of sorting, a search over the logits, ordered as integers, finds the drawn one: each pass
over the row sums the mass at or above three boundaries. Such a sum depends on its boundary alone,
and it never falls when more tokens join, rounding included, since every pass adds the same terms in
the same order. So the search always ends on a logit that occurs.

Specification: ``reference.sample_tail``. Test: ``tests/kernels/test_vocabulary.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguide.kernels import tuning

from .order import logit_of, ordered

LOG2E = tl.constexpr(1.4426950408889634)
BELOW_ONE = tl.constexpr(1.0 - 2.0**-53)


@triton.jit
def _load(row, at):
    """The logits at ``at``, -inf for those that do not rank below (``bound``, ``bound_id``)."""
    row_ptr, vocab, column_stride, _, bound, bound_id = row
    x = tl.load(row_ptr + at * column_stride, mask=at < vocab, other=float("-inf")).to(tl.float32)
    return tl.where((x < bound) | ((x == bound) & (at > bound_id)), x, float("-inf"))


@triton.jit
def _mass(row, x, top, COUNT: tl.constexpr):
    """What tokens weigh: ``exp(z - top)``; where they are counted, 1 unless they are impossible."""
    z = x * row[3]
    if COUNT:
        return tl.where(z > float("-inf"), 1.0, 0.0)
    else:
        return tl.exp2((z - top) * LOG2E)


@triton.jit
def _weigh(row, top, a, b, c, offset, COUNT: tl.constexpr):
    """The masses of the tokens with logits of at least ``a``, ``b`` and ``c``."""
    WIDTH: tl.constexpr = offset.shape[1]
    from_a = tl.zeros([WIDTH], tl.float32)
    from_b = tl.zeros([WIDTH], tl.float32)
    from_c = tl.zeros([WIDTH], tl.float32)
    for start in range(0, row[1], offset.numel):
        x = _load(row, start + offset)
        mass = _mass(row, x, top, COUNT)
        from_a += tl.sum(tl.sum(tl.where(x >= a, mass, 0.0), 2), 0)
        from_b += tl.sum(tl.sum(tl.where(x >= b, mass, 0.0), 2), 0)
        from_c += tl.sum(tl.sum(tl.where(x >= c, mass, 0.0), 2), 0)
    from_a = tl.sum(from_a.to(tl.float64), 0)
    from_b = tl.sum(from_b.to(tl.float64), 0)
    from_c = tl.sum(from_c.to(tl.float64), 0)
    return from_a, from_b, from_c


@triton.jit
def _narrow(target, low, from_low, high, from_high, boundary, mass):
    """The part of the range [low, high) in which the mass passes the target."""
    passed, inside = mass > target, boundary < high  # a NaN does not pass, so that the search ends
    raise_low, lower_high = passed & inside, (not passed) & inside
    return (
        tl.where(raise_low, boundary, low),
        tl.where(raise_low, mass, from_low),
        tl.where(lower_high, boundary, high),
        tl.where(lower_high, mass, from_high),
    )


@triton.jit
def draw_below(
    row,
    goal,
    COUNT: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The drawn token among those that rank below the bound, with its logit.

    Args:
        row: pointer to the row, vocabulary, stride along it, inverse temperature, and the bound:
            a logit and an id.
        goal: the fraction of the tail's mass to go through, fp64; with ``COUNT``, how many of the
            possible tokens to go through, of which the last is drawn.
        COUNT: what tokens weigh, see ``_mass``.
        UNROLL: vectors of a thread; this and the following are the shape that ``tile`` gives.
        WIDTH: threads.
        VECTOR: elements of a vector.

    Returns:
        id int32 and logit fp32; the bound itself where no token below it is possible.
    """
    row_ptr, vocab, _, inv_temperature, bound, bound_id = row
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    TILE: tl.constexpr = UNROLL * WIDTH * VECTOR
    lane = tl.arange(0, UNROLL)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    offset = lane[:, :, None] * VECTOR + tl.arange(0, VECTOR)

    top = tl.full([WIDTH], float("-inf"), tl.float32)
    for start in range(0, vocab, TILE):
        top = tl.maximum(top, tl.max(tl.max(_load(row, start + offset), 2), 0))
    top = tl.max(top, 0)
    top_z = top * inv_temperature
    top_z = tl.where(top_z == float("-inf"), 0.0, top_z)

    # The drawn logit is the largest that has more than the target at or above it. As an integer
    # it is in [low, high); from_low and from_high are the masses at or above these two.
    least = float("-inf")
    low = ordered(tl.full([], least, tl.float32), dtype).to(tl.int64)
    high = ordered(top, dtype).to(tl.int64) + 1
    from_low, _, _ = _weigh(row, top_z, least, least, least, offset, COUNT)
    from_high = tl.zeros([], tl.float64)
    total = from_low
    target = tl.minimum(goal, total) - 1 if COUNT else tl.minimum(goal, BELOW_ONE) * total
    # Most draws are near the top: the first boundaries lie an eighth of an octave below it, half
    # an octave and two octaves. From then on they quarter the range.
    step = tl.full([], 2 ** (dtype.fp_mantissa_width - 4), tl.int64)
    a, b, c = high - 16 * step, high - 4 * step, high - step
    alone = False
    while (high - low > 1) & (not alone):
        a, b, c = tl.maximum(a, low), tl.maximum(b, low), tl.maximum(c, low)
        from_a, from_b, from_c = _weigh(
            row,
            top_z,
            logit_of(a.to(tl.int32), dtype),
            logit_of(b.to(tl.int32), dtype),
            logit_of(c.to(tl.int32), dtype),
            offset,
            COUNT,
        )
        # Of the four ranges, the one in which the mass passes the target; the highest comes last.
        low, from_low, high, from_high = _narrow(target, low, from_low, high, from_high, a, from_a)
        low, from_low, high, from_high = _narrow(target, low, from_low, high, from_high, b, from_b)
        low, from_low, high, from_high = _narrow(target, low, from_low, high, from_high, c, from_c)
        step = (high - low + 3) // 4
        a, b, c = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        # A range that weighs less than two of its lightest possible token holds one token.
        lightest = _mass(row, logit_of(low.to(tl.int32), dtype), top_z, COUNT)
        alone = from_low - from_high < 1.5 * lightest

    # Among equal logits the mass grows evenly along the ids: the rank of the draw is a quotient.
    lower, upper = logit_of(low.to(tl.int32), dtype), logit_of(high.to(tl.int32), dtype)
    rank = tl.floor((target - from_high) / _mass(row, lower, top_z, COUNT)).to(tl.int32)
    tile_start = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int32)
    seen = tl.zeros([], tl.int32)
    for start in range(0, vocab, TILE):
        x = _load(row, start + offset)
        inside = ((x >= lower) & (x < upper)).to(tl.int32)
        found = tl.sum(tl.sum(tl.sum(inside, 2), 0), 0)
        here = (found > 0) & (seen <= rank)
        tile_start = tl.where(here, start, tile_start)
        before = tl.where(here, seen, before)
        seen += found
    at = tile_start + tl.arange(0, TILE)
    x = _load(row, at)
    inside = (x >= lower) & (x < upper)
    number = tl.cumsum(inside.to(tl.int32), 0)
    # Rounding can leave the quotient a little above the last.
    drawn = inside & (number == tl.minimum(rank - before + 1, tl.max(number, 0)))
    token = tl.sum(tl.where(drawn, at, 0), 0)
    logit = tl.max(tl.where(drawn, x, float("-inf")), 0)
    return tl.where(total > 0, token, bound_id), tl.where(total > 0, logit, bound)


@triton.jit
def _sample_tail_kernel(
    token_ptr,
    z_ptr,
    logits_ptr,
    inv_temperature_ptr,
    count_ptr,
    fraction_ptr,
    vocab,
    row_stride,
    column_stride,
    inv_temperature_stride,
    count_stride,
    fraction_stride,
    UNROLL: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column_stride = tl.cast(column_stride, tl.int64)
    fraction = tl.load(fraction_ptr + row * fraction_stride)
    token = tl.full([], -1, tl.int64)
    z = tl.full([], float("nan"), tl.float64)
    if fraction >= 0:
        row_ptr = logits_ptr + row * row_stride
        inv_temperature = tl.load(inv_temperature_ptr + row * inv_temperature_stride)
        count = tl.load(count_ptr + row * count_stride).to(tl.float64)
        everything = (row_ptr, vocab, column_stride, inv_temperature, float("inf"), -1)
        bound_id, bound = draw_below(everything, count, True, UNROLL, WIDTH, VECTOR)
        bound = tl.where(count > 0, bound, float("inf"))
        tail = (row_ptr, vocab, column_stride, inv_temperature, bound, bound_id)
        found, logit = draw_below(tail, fraction, False, UNROLL, WIDTH, VECTOR)
        token = found.to(tl.int64)
        z = (logit * inv_temperature).to(tl.float64)
    tl.store(token_ptr + row, token)
    tl.store(z_ptr + row, z)


def tile(logits: Tensor, warps: int) -> dict[str, int]:
    """Shape of the tiles in which a program walks a row: two vectors of 16 bytes per thread.

    Where a vector can straddle the end of the vocabulary or 16 bytes, threads take single elements.
    """
    elements = 16 // logits.element_size()
    aligned = logits.stride(1) == 1 and logits.data_ptr() % 16 == 0
    aligned = aligned and logits.stride(0) % 16 == 0 and logits.shape[1] % 16 == 0
    vector = elements if aligned else 1
    return {"UNROLL": 2 * elements // vector, "WIDTH": 32 * warps, "VECTOR": vector}


def sample_tail(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor
) -> tuple[Tensor, Tensor]:
    """``reference.sample_tail`` for fp32, bf16 and fp16.

    Masses are fp32, within about 1e-6 of the reference's, so a fraction that falls so close to the
    border of two tokens may draw the other.
    """
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    z = torch.empty(rows, dtype=torch.float64, device=logits.device)
    if rows == 0:
        return token, z
    warps = tuning.tail_warps(rows, logits.device)
    with torch.cuda.device_of(logits):
        _sample_tail_kernel[(rows,)](
            token,
            z,
            logits,
            inv_temperature,
            count,
            fraction,
            vocab,
            logits.stride(0),
            logits.stride(1),
            inv_temperature.stride(0),
            count.stride(0),
            fraction.stride(0),
            **tile(logits, warps),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return token, z
