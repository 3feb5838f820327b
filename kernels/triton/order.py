"""The order of tokens as integer keys, and the largest keys of a block, for the kernels here.

Every op orders tokens by descending logit, ties by the lower id. One integer holds both: the bits
of the logit, rearranged so that they compare like the number, above the complement of the id. Keys
of different tokens differ, so a sort by them is stable by nature and needs no second array.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

LEAST_KEY = tl.constexpr(-(2**63))
"""Below the wide key of every number, NaN included: what padding holds."""


@triton.jit
def ordered(logit, dtype: tl.constexpr):
    """int32 that compare like the fp32 logits, which are exact in ``dtype`` and fill its width."""
    if dtype == tl.float32:
        bits = (logit + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0, with which it ties
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = (logit + 0.0).to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        return bits ^ ((bits >> 15) & 0x7FFF)


@triton.jit
def logit_of(number, dtype: tl.constexpr):
    """The fp32 logit that ``ordered`` made an int32 of."""
    if dtype == tl.float32:
        return (number ^ ((number >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    bits = number ^ ((number >> 15) & 0x7FFF)
    if dtype == tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def wide_key(logit, index):
    """int64 keys of fp32 logits, for indices of up to 32 bits."""
    return (ordered(logit, tl.float32).to(tl.int64) << 32) | (index.to(tl.int64) ^ 0xFFFFFFFF)


@triton.jit
def wide_logit(key):
    """The fp32 logit of a wide key."""
    return logit_of((key >> 32).to(tl.int32), tl.float32)


@triton.jit
def wide_index(key):
    """The index of a wide key, int64; 2**32 - 1 for ``LEAST_KEY``."""
    return (key & 0xFFFFFFFF) ^ 0xFFFFFFFF


@triton.jit
def narrow_key(logit, index, dtype: tl.constexpr):
    """Keys of logits that are exact in ``dtype``, for indices of up to 16 bits.

    fp16 and bf16 fit into one int32, which halves the price of sorting; fp32 takes wide keys.
    """
    if dtype == tl.float32:
        return wide_key(logit, index)
    else:
        return (ordered(logit, dtype) << 16) | (index ^ 0xFFFF)


@triton.jit
def narrow_logit(key, dtype: tl.constexpr):
    """The logit of a narrow key, fp32."""
    if dtype == tl.float32:
        return wide_logit(key)
    else:
        return logit_of(key >> 16, dtype)


@triton.jit
def narrow_index(key, dtype: tl.constexpr):
    """The index of a narrow key, int32."""
    if dtype == tl.float32:
        return wide_index(key).to(tl.int32)
    else:
        return (key & 0xFFFF) ^ 0xFFFF


@triton.constexpr_function
def log2(power):
    """The logarithm of a power of two."""
    return power.bit_length() - 1


@triton.constexpr_function
def _along(dim, dims):
    """The shape that lays two numbers along the ``dim``-th innermost of ``dims`` dimensions."""
    return [2 if i == dims - 1 - dim else 1 for i in range(dims)]


@triton.jit
def _merge(h, LOG: tl.constexpr, DIMS: tl.constexpr):
    """Sort bitonic runs of ``2**LOG`` of the ``2**DIMS`` keys, descending, every other ascending.

    ``h`` has ``DIMS`` dimensions of size 2, so that partners differ in one index.
    """
    bit = tl.arange(0, 2)
    ascending = tl.reshape(bit, _along(LOG, DIMS)) if LOG < DIMS else 0
    for i in tl.static_range(LOG):
        partner = tl.sum(h, DIMS - LOG + i, keep_dims=True) - h  # exact: it wraps around
        second = tl.reshape(bit, _along(LOG - 1 - i, DIMS))
        h = tl.where((h < partner) == (second == ascending), partner, h)
    return h


@triton.jit
def largest(keys, K: tl.constexpr, SORTED: tl.constexpr = False):
    """The ``K`` largest keys, descending: a bitonic top-k network; sizes are powers of two.

    Unlike ``tl.topk`` it can start from keys that lie in runs of ``K``, every other one ascending
    (``SORTED``), and the interpreter runs it on whole arrays.
    """
    LOG_N: tl.constexpr = log2(keys.shape[0])
    LOG_K: tl.constexpr = log2(K)
    h = tl.reshape(keys, [2] * LOG_N)
    if not SORTED:
        for i in tl.static_range(LOG_K):
            h = _merge(h, i + 1, LOG_N)
    for i in tl.static_range(LOG_N - LOG_K):
        # Of two runs in opposite order the larger of each pair: the better half, again bitonic.
        h = tl.max(h, LOG_N - 1 - LOG_K - i)
        h = _merge(h, LOG_K, LOG_N - 1 - i)
    return tl.reshape(h, [K])
