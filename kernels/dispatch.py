"""Chooses the implementation of an op, once, from the tensors it is given."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import native, reference, triton

IMPLEMENTATIONS = ("auto", "reference", "native", "triton")
"""What ``impl`` may be."""


def chosen(impl: str, *tensors: Tensor, **sizes: int) -> ModuleType:
    """The module that runs an op on these tensors.

    ``auto`` takes the fastest implementation that can do the work: Triton on a GPU, C++ on the
    CPU, else the reference. Any other ``impl`` is an order: carried out or refused, not replaced.

    Args:
        impl: one of ``IMPLEMENTATIONS``.
        tensors: those that decide: the ones whose dtype and strides may differ.
        sizes: those that ``triton.obstacle`` limits.

    Raises:
        ValueError: ``impl`` is unknown, or the forced implementation cannot do the work.
    """
    if impl == "auto":
        candidate = triton if tensors[0].is_cuda else native
        return reference if _obstacle(candidate, tensors, sizes) else candidate
    if impl == "reference":
        return reference
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}.")
    forced = native if impl == "native" else triton
    if reason := _obstacle(forced, tensors, sizes):
        raise ValueError(f"impl={impl!r} cannot run here: {reason}.")
    return forced


def differentiable(impl: str, *tensors: Tensor) -> bool:
    """Whether a result needs a gradient, which only the reference has.

    Raises:
        ValueError: it does, but another implementation is forced.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    if impl in ("native", "triton"):
        raise ValueError(
            f"impl={impl!r} has no gradient: call it under torch.no_grad(), or use the reference."
        )
    return True


def _obstacle(module: ModuleType, tensors: tuple[Tensor, ...], sizes: dict[str, int]) -> str | None:
    reason: str | None = module.obstacle(*tensors, **(sizes if module is triton else {}))
    return reason
