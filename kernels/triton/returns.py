"""TD(lambda) targets: a reverse scan along each row.

Formula: ``G_t = r_t + m_t gamma ((1 - lam) V_{t+1} + lam G_{t+1})`` inside the mask, where ``m_t``
tells whether the state after t is inside too; 0 outside.

Bytes: values, rewards and mask once, targets once.

The recurrence is linear, ``G_t = c_t + a_t G_{t+1}``, so runs of it compose: (a, c) after (a', c')
is (a a', c + a c'). A program scans its row in blocks, from the end, and carries one number.

Specification: ``reference.td_lambda``. Test: ``tests/kernels/test_returns.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguide.kernels import tuning


@triton.jit
def _compose(a_later, c_later, a, c):
    return a_later * a, c + a * c_later


@triton.jit
def _td_lambda_kernel(
    targets_ptr,
    values_ptr,
    rewards_ptr,
    mask_ptr,
    length,
    value_row,
    reward_row,
    mask_row,
    gamma,
    lam,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * value_row
    rewards_ptr += row * reward_row
    mask_ptr += row * mask_row
    blocks = tl.cdiv(length, BLOCK)
    after = tl.zeros([], tl.float32)
    for i in range(blocks):
        t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = tl.load(mask_ptr + t, mask=t < length, other=0) != 0
        more = inside & (tl.load(mask_ptr + t + 1, mask=t + 1 < length, other=0) != 0)
        ahead = tl.load(values_ptr + t + 1, mask=more, other=0.0).to(tl.float32)
        reward = tl.load(rewards_ptr + t, mask=inside, other=0.0).to(tl.float32)
        a = tl.where(more, gamma * lam, 0.0)
        c = reward + tl.where(more, gamma * (1.0 - lam) * ahead, 0.0)
        a, c = tl.associative_scan((a, c), 0, _compose, reverse=True)
        target = c + a * after
        tl.store(
            targets_ptr + row * length + t,
            target.to(targets_ptr.dtype.element_ty),
            mask=t < length,
        )
        after = tl.sum(tl.where(t == (blocks - 1 - i) * BLOCK, target, 0.0), 0)


def td_lambda(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """``reference.td_lambda`` for fp32, bf16 and fp16."""
    values, rewards, mask = (
        t if t.stride(1) == 1 else t.contiguous() for t in (values, rewards, mask)
    )
    rows, length = values.shape
    targets = torch.empty(rows, length, dtype=values.dtype, device=values.device)
    if rows == 0 or length == 0:
        return targets
    block = min(1024, tuning.power_of_two(length))
    with torch.cuda.device_of(values):
        _td_lambda_kernel[(rows,)](
            targets,
            values,
            rewards,
            mask,
            length,
            values.stride(0),
            rewards.stride(0),
            mask.stride(0),
            float(gamma),
            float(lam),
            BLOCK=block,
            num_warps=max(1, block // 256),
            enable_fp_fusion=True,
        )
    return targets
