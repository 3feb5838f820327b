"""Passes over the vocabulary: the top of a row with its log-sum-exp, and a draw from below it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def topk_logsumexp(
    logits: Tensor, k: int, inv_temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k values with ids, and the log-sum-exp of whole rows, of logits at a row's temperature.

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64, any strides; -inf allowed, NaN and +inf not.
        k: how many to return, at least 1.
        inv_temperature: ``[N]`` fp32, positive.

    Returns:
        values ``[N, k]`` fp32 (fp64 for fp64 logits) of ``z = logits * inv_temperature``, sorted
        by the logit; ids ``[N, k]`` int32, ties of logits broken by the lower id, so that neither
        depends on the temperature; lse ``[N]`` fp64 (differences from it are taken, and an fp32
        near 20 is only known to 1e-6).
        Columns past the vocabulary hold -inf and id -1. A row that holds a NaN or +inf has a lse
        that is not finite, and unspecified values and ids of the vocabulary.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    exact = logits.to(wide)
    z = exact * inv_temperature.to(wide)[:, None]
    lse = torch.logsumexp(z.double(), dim=-1)
    vocab = z.shape[1]
    width = min(k, vocab)
    order = _descending(exact)[:, :width]
    values = z.gather(-1, order)
    ids = order.to(torch.int32).contiguous()
    if width < k:
        values = F.pad(values, (0, k - width), value=float("-inf"))
        ids = F.pad(ids, (0, k - width), value=-1)
    return values, ids, lse


def _descending(logits: Tensor) -> Tensor:
    """Token ids ``[N, V]`` by descending logit, ties by the lower id: the order of every op."""
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices


def sample_tail(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from the tokens outside the candidates, for the few rows that need it.

    The tail is every token ranked ``count`` or later by descending logit (ties: lower id first).
    The draw is the first token at which the tail's cumulative mass, in that order, exceeds
    ``fraction`` of the whole tail.

    Args:
        logits: ``[N, V]`` as given to ``topk_logsumexp``.
        inv_temperature: ``[N]`` fp32.
        count: ``[N]`` integers, candidates per row, below V in the rows that draw.
        fraction: ``[N]`` fp64 in [0, 1); negative in rows that need nothing and are not read.

    Returns:
        token ``[N]`` int64 and its ``z`` ``[N]`` fp64; -1 and NaN in rows that need nothing.
    """
    token = torch.full_like(fraction, -1, dtype=torch.int64)
    found_z = torch.full_like(fraction, float("nan"))
    rows = torch.nonzero(fraction >= 0)[:, 0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    exact = logits[rows].to(wide)
    order = _descending(exact)
    z = (exact * inv_temperature[rows].to(wide)[:, None]).double().gather(-1, order)
    ranks = torch.arange(z.shape[1], device=z.device)
    inside = ranks < count[rows][:, None]
    top = z.masked_fill(inside, float("-inf")).max(dim=-1, keepdim=True).values
    mass = torch.exp(z - torch.nan_to_num(top, neginf=0.0)).masked_fill(inside, 0.0)
    cumulative = mass.cumsum(-1)
    target = fraction[rows][:, None] * cumulative[:, -1:]
    # Where rounding made a tail out of nothing, the last possible token takes the draw.
    last = torch.isfinite(z).sum(-1) - 1
    found = torch.minimum((cumulative <= target).sum(-1), last)[:, None]
    token[rows], found_z[rows] = order.gather(-1, found)[:, 0], z.gather(-1, found)[:, 0]
    return token, found_z
