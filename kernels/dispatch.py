"""Chooses the implementation of an op, once, from the tensor it is given.

``impl="auto"`` takes the fastest implementation that can do the work; ``chosen`` tells which one
that is. Any other ``impl`` is an order: it is carried out or refused, never replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, reference

IMPLEMENTATIONS = ("auto", "reference", "native")
"""What ``impl`` may be."""


def chosen(logits: Tensor, impl: str = "auto") -> str:
    """The name of the implementation that ``topk_logsumexp`` runs for these logits.

    Args:
        logits: ``[N, V]``.
        impl: one of ``IMPLEMENTATIONS``.

    Raises:
        ValueError: ``impl`` is unknown.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}.")
    if impl == "auto":
        return "reference" if native.obstacle(logits) else "native"
    return impl


def topk_logsumexp(
    logits: Tensor, k: int, inv_temperature: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k values with ids, and the log-sum-exp of whole rows, of logits at a row's temperature.

    The contract is that of ``reference.topk_logsumexp``; nothing is mutated, and the result is
    deterministic.

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64, V at least 1; -inf allowed, NaN and +inf not.
        k: how many to return, at least 1; columns past the vocabulary hold -inf and id -1.
        inv_temperature: ``[N]`` fp32 on the device of the logits (fp64 too for fp64 logits),
            positive and finite.
        impl: one of ``IMPLEMENTATIONS``.

    Returns:
        values ``[N, k]`` fp32 (fp64 for fp64 logits), sorted; ids ``[N, k]`` int32, ties broken by
        the lower id; lse ``[N]`` fp64.

    Raises:
        ValueError: an argument is not as described, or a forced implementation cannot do the work.
    """
    _check(logits, k, inv_temperature)
    if chosen(logits, impl) == "native":
        return native.topk_logsumexp(logits, k, inv_temperature)
    return reference.topk_logsumexp(logits, k, inv_temperature)


def _check(logits: Tensor, k: int, inv_temperature: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be [N, V] with V at least 1, not {list(logits.shape)}.")
    if not logits.is_floating_point():
        raise ValueError(
            f"logits must be float32, bfloat16, float16 or float64, not {logits.dtype}."
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
    if inv_temperature.shape != logits.shape[:1]:
        raise ValueError(
            f"inv_temperature must be [{logits.shape[0]}], one per row of logits, "
            f"not {list(inv_temperature.shape)}."
        )
    if inv_temperature.device != logits.device:
        raise ValueError(
            f"inv_temperature must be on the device of the logits, {logits.device}, "
            f"not {inv_temperature.device}."
        )
    allowed = {torch.float32, logits.dtype} if logits.dtype == torch.float64 else {torch.float32}
    if inv_temperature.dtype not in allowed:
        raise ValueError(f"inv_temperature must be float32, not {inv_temperature.dtype}.")
