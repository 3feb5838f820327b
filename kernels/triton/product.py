"""The matrix product of the kernels here: exact in fp32, and right in the interpreter too."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply_add(a, b, acc):
    """``a b + acc`` with fp32 sums; on tensor cores where both have the same 16-bit type."""
    if a.dtype != b.dtype or INTERPRETED:  # the interpreter would multiply the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
