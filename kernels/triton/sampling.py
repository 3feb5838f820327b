"""From base values and guide scores to a token, in one launch.

Formula: ``u_i = scale z_i + weight (s_i - shift)`` for the candidates, ``z_j`` or -inf for all
other tokens, ``Z = logaddexp(logsumexp_i u_i, T)`` with the log-mass ``T`` of the others, and
``KL = sum_i exp(u_i - Z) (u_i - z_i) + A - Z``; a draw by inversion, or the mode.

Bytes: per row ``K`` values and ids, ``G K`` scores, 52 bytes of parameters and 32 of results; rows
that draw from the tail read their logits again (``tail.py``).

One program per row, in fp64; the candidates fill a register or two of each thread.

Specification: ``reference.guide_sample``. Test: ``tests/kernels/test_sampling.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguide.kernels import reference, tuning
from fastguide.kernels.reference import GuidedSample

from .tail import draw_below, tile

FILL = tl.constexpr(reference.FILL)
FILL_MEAN = tl.constexpr(reference.FILL_MEAN)
FILL_DROP = tl.constexpr(reference.FILL_DROP)
GREEDY = tl.constexpr(reference.GREEDY)
LOG_SIGMOID = tl.constexpr(reference.LOG_SIGMOID)
TAIL = tl.constexpr(reference.TAIL)


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for fp64 from 0 to 1, accurate for small x too (Kahan)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _logsumexp(x):
    top = tl.max(x, 0)
    finite = tl.where(_finite(top), top, 0.0)
    return finite + tl.log(tl.sum(tl.exp(x - finite), 0))


@triton.jit
def _logaddexp(a, b):
    """For an ``a`` that is finite."""
    return tl.maximum(a, b) + _log1p(tl.exp(-tl.abs(a - b)))


@triton.jit
def _philox_uniform(seed, position):
    """``reference.philox_uniform``, bit for bit."""
    c0, c1, _, _ = tl.philox(seed, position.to(tl.uint32), 0, 0, 0)
    bits = (c0.to(tl.uint64) << 21) | (c1.to(tl.uint64) >> 11)
    return bits.to(tl.int64).to(tl.float64) * 2.0**-53


@triton.jit
def _composed_score(
    scores_ptr,  # of the row, [G, K] with these strides
    weights_ptr,  # of the row, [G]
    guides,
    guide_stride,
    column_stride,
    weight_stride,
    candidate,
    squash,
    K: tl.constexpr,
):
    column = tl.arange(0, K)
    score = tl.zeros([K], tl.float64)
    for _ in range(guides):
        weight = tl.load(weights_ptr)
        read = tl.where(weight != 0, candidate, False)
        found = tl.load(scores_ptr + column * column_stride, mask=read, other=0.0).to(tl.float64)
        log_sigmoid = tl.minimum(found, 0.0) - _log1p(tl.exp(-tl.abs(found)))
        score += weight * tl.where(read & squash, log_sigmoid, found)
        scores_ptr += guide_stride
        weights_ptr += weight_stride
    return score


@triton.jit(do_not_specialize=["columns", "guides"])
def _guide_sample_kernel(
    token_ptr,
    source_ptr,
    score_ptr,
    logprob_ptr,
    base_logprob_ptr,
    kl_ptr,
    logits_ptr,
    inv_temperature_ptr,
    values_ptr,
    ids_ptr,
    lse_ptr,
    scores_ptr,
    guide_weights_ptr,
    count_ptr,
    mode_ptr,
    scale_ptr,
    weight_ptr,
    seed_ptr,
    position_ptr,
    vocab,
    columns,
    guides,
    logits_row_stride,
    logits_column_stride,
    values_row_stride,
    ids_row_stride,
    scores_guide_stride,
    scores_row_stride,
    scores_column_stride,
    weights_guide_stride,
    weights_row_stride,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, K)
    count = tl.load(count_ptr + row)
    mode = tl.load(mode_ptr + row)
    fill, greedy = mode & FILL, (mode & GREEDY) != 0
    listed = column < columns
    values = tl.load(
        values_ptr + row * values_row_stride + column, mask=listed, other=float("-inf")
    ).to(tl.float64)
    ids = tl.load(ids_ptr + row * ids_row_stride + column, mask=listed, other=-1)

    s = _composed_score(
        scores_ptr + row * scores_row_stride,
        guide_weights_ptr + row * weights_row_stride,
        guides,
        scores_guide_stride,
        scores_column_stride,
        weights_guide_stride,
        listed & (column < count),
        (mode & LOG_SIGMOID) != 0,
        K,
    )
    A = tl.load(lse_ptr + row)
    sound = _finite(A) & (tl.min(_finite(s).to(tl.int32), 0) == 1)
    A = tl.where(sound, A, 0.0)
    z = tl.where(column < count, values, float("-inf"))
    chosen = _finite(z)
    number = tl.sum(chosen.to(tl.int32), 0)
    mean = tl.sum(tl.where(chosen, s, 0.0), 0) / tl.maximum(number, 1)
    shift = tl.where(fill == FILL_MEAN, mean, 0.0)
    bonus = tl.load(weight_ptr + row) * (s - shift)
    u = tl.where(chosen, tl.load(scale_ptr + row) * z + bonus, float("-inf"))

    # What the others weigh, between what they must weigh at least and can weigh at most.
    inside = _logsumexp(z)
    following = tl.max(tl.where(column == count, values, float("-inf")), 0)
    others = tl.maximum(vocab - count, 1).to(tl.float64)
    tail = A + tl.log(1.0 - tl.exp(tl.minimum(inside - A, 0.0)))
    tail = tl.minimum(tl.maximum(tail, following), following + tl.log(others))
    tail = tl.where(fill == FILL_DROP, float("-inf"), tail)
    Z = _logaddexp(_logsumexp(u), tail)
    prob = tl.exp(u - Z)
    kl = tl.sum(prob * tl.where(chosen, u - z, 0.0), 0) + A - Z

    cumulative = tl.cumsum(prob, 0)
    mass = tl.max(cumulative, 0)
    draw = _philox_uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    index = tl.sum((cumulative <= draw).to(tl.int32), 0)
    last = number - 1
    # Rounding can leave the last sum a little under 1; without a tail the last candidate takes it.
    index = tl.where(tail == float("-inf"), tl.minimum(index, last), index)
    in_tail = index > last

    best_value = tl.max(u, 0)
    best = tl.min(tl.where(u == best_value, column, K), 0)
    other_wins = greedy & (fill != FILL_DROP) & (following > best_value)
    index = tl.where(greedy, tl.where(other_wins, count, best), index)
    unscored = tl.where(greedy, other_wins, in_tail)

    picked = column == tl.minimum(index, columns - 1)
    token = tl.sum(tl.where(picked, ids, 0), 0)
    token_z = tl.sum(tl.where(picked, values, 0.0), 0)
    token_u = tl.where(unscored, token_z, tl.sum(tl.where(picked, u, 0.0), 0))
    score = tl.sum(tl.where(picked, s, 0.0), 0)
    if sound & in_tail & (not greedy):
        row_ptr = logits_ptr + row * logits_row_stride
        stride = tl.cast(logits_column_stride, tl.int64)
        inv_temperature = tl.load(inv_temperature_ptr + row)
        bound_id = tl.sum(tl.where(column == last, ids, 0), 0)
        bound = tl.load(
            row_ptr + bound_id * stride, mask=(bound_id >= 0) & (bound_id < vocab), other=0.0
        )
        below = (row_ptr, vocab, stride, inv_temperature, bound.to(tl.float32), bound_id)
        fraction = tl.maximum((draw - mass) / tl.exp(tail - Z), 0.0)
        token, logit = draw_below(below, fraction, False, UNROLL, WIDTH, VECTOR)
        token_z = (logit * inv_temperature).to(tl.float64)
        token_u = token_z

    nan = float("nan")
    tl.store(token_ptr + row, tl.where(sound, token, -1).to(tl.int64))
    tl.store(source_ptr + row, tl.where(sound & (not unscored), index, TAIL).to(tl.int64))
    tl.store(score_ptr + row, tl.where(sound & (not unscored), score, nan).to(tl.float32))
    tl.store(logprob_ptr + row, tl.where(sound, token_u - Z, nan).to(tl.float32))
    tl.store(base_logprob_ptr + row, tl.where(sound, token_z - A, nan).to(tl.float32))
    tl.store(kl_ptr + row, tl.where(sound, tl.maximum(kl, 0.0), nan).to(tl.float32))


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
) -> GuidedSample:
    """``reference.guide_sample``, for logits of fp32, bf16 and fp16; draws as ``sample_tail``."""
    rows, vocab = logits.shape
    device = logits.device
    whole = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
    real = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(4))
    out = GuidedSample(*whole, *real)
    if rows == 0:
        return out
    columns = values.shape[1]
    values = values if values.stride(1) == 1 else values.contiguous()
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    warps = tuning.tail_warps(rows, device)
    with torch.cuda.device_of(logits):
        _guide_sample_kernel[(rows,)](
            *out,
            logits,
            inv_temperature.contiguous(),
            values,
            ids,
            lse.contiguous(),
            scores,
            guide_weights,
            *(x.contiguous() for x in (count, mode, scale, weight, seed, position)),
            vocab,
            columns,
            scores.shape[0],
            logits.stride(0),
            logits.stride(1),
            values.stride(0),
            ids.stride(0),
            *scores.stride(),
            *guide_weights.stride(),
            K=tuning.power_of_two(columns),
            **tile(logits, warps),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return out
