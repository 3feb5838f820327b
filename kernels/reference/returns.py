"""Targets of value training."""

from __future__ import annotations

import torch
from torch import Tensor


def td_lambda(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """TD(lambda) targets of state values (VAS section 2.2; Sutton and Barto, chapter 12).

    With the terminal reward as the value of the last state, ``G_T = r_T`` and, before it,
    ``G_t = r_t + gamma * ((1 - lam) * V_{t+1} + lam * G_{t+1})``. ``lam = 1`` gives Monte-Carlo
    returns, ``lam = 0`` one-step TD.

    Args:
        values: ``[B, T]`` estimated values of the states.
        rewards: ``[B, T]`` rewards on entering the states.
        mask: ``[B, T]`` bool, the states that count: one contiguous run per row.
        gamma: discount, in [0, 1].
        lam: in [0, 1].

    Returns:
        targets ``[B, T]`` in the dtype of ``values``; 0 outside the mask. The recursion runs in
        fp32, or fp64 for fp64 inputs.
    """
    dtype = values.dtype
    wide = torch.promote_types(dtype, torch.float32)
    values, rewards = values.to(wide), rewards.to(wide)
    targets = values.new_zeros(values.shape)
    following = values.new_zeros(values.shape[0])
    for t in range(values.shape[1] - 1, -1, -1):
        more = mask[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(mask[:, t])
        ahead = values[:, t + 1] if t + 1 < values.shape[1] else following
        step = gamma * ((1.0 - lam) * ahead + lam * following)
        following = rewards[:, t] + torch.where(more, step, torch.zeros_like(step))
        following = torch.where(mask[:, t], following, torch.zeros_like(following))
        targets[:, t] = following
    return targets.to(dtype)
