"""Chooses the implementation of an op, once, from the tensors it is given."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import native, reference, triton

IMPLEMENTATIONS = ("auto", "reference", "native", "triton")
"""What ``impl`` may be."""


def chosen(impl: str, *tensors: Tensor, k: int = 0) -> ModuleType:
    """The module that runs an op on these tensors.

    ``auto`` takes the fastest implementation that can do the work: Triton on a GPU, C++ on the
    CPU, else the reference. Any other ``impl`` is an order: carried out or refused, not replaced.

    Args:
        impl: one of ``IMPLEMENTATIONS``.
        tensors: those that decide: the ones whose dtype and strides may differ.
        k: columns asked for, where an op has them.

    Raises:
        ValueError: ``impl`` is unknown, or the forced implementation cannot do the work.
    """
    if impl == "auto":
        candidate = triton if tensors[0].is_cuda else native
        return reference if _obstacle(candidate, tensors, k) else candidate
    if impl == "reference":
        return reference
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}.")
    forced = native if impl == "native" else triton
    if reason := _obstacle(forced, tensors, k):
        raise ValueError(f"impl={impl!r} cannot run here: {reason}.")
    return forced


def _obstacle(module: ModuleType, tensors: tuple[Tensor, ...], k: int) -> str | None:
    limits = {"k": k} if module is triton else {}
    return module.obstacle(*tensors, **limits)
