"""The ops for GPUs, in Triton; on the CPU, for tests, under ``TRITON_INTERPRET=1``.

Each file has formula, bytes moved, kernel and launcher of one subject, under the names and with
the contracts of ``reference``. Launchers trust their arguments (``ops`` checks them), allocate
outputs and scratch, never wait for the device, and may be captured in a CUDA graph.
"""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32

from fastguide.kernels import tuning


def missing(error: ImportError) -> str:
    """What is said where Triton cannot be imported."""
    return f"Triton is not installed ({error}); to install it: pip install 'fastguide[triton]'"


try:
    import triton
except ImportError as error:
    _why_not = missing(error)
    _interpreted = False
else:
    _why_not = ""
    _interpreted = triton.knobs.runtime.interpret
    from .attention import tree_attention
    from .lora import lora_rows
    from .returns import td_lambda
    from .sampling import guide_sample
    from .tail import sample_tail
    from .vocabulary import topk_logsumexp

DTYPES = (float32, bfloat16, float16)
"""What logits, keys, weights and values may be."""

__all__ = [
    "DTYPES",
    "available",
    "guide_sample",
    "lora_rows",
    "obstacle",
    "sample_tail",
    "td_lambda",
    "topk_logsumexp",
    "tree_attention",
]


def available() -> bool:
    """Whether Triton is installed."""
    return not _why_not


def obstacle(*tensors: Tensor, k: int = 0, head: int = 0) -> str | None:
    """Why the Triton ops cannot take these tensors here, as a sentence, or None if they can.

    Args:
        tensors: those whose dtype may differ: logits; query, keys and values; and so on.
        k: columns asked for, where an op has them.
        head: the larger head size, of keys or values, where an op has them.
    """
    if _why_not:
        return _why_not
    for tensor in tensors:
        if not tensor.is_cuda and not _interpreted:
            return f"the Triton ops read CUDA tensors, not {tensor.device.type}"
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            received = str(tensor.dtype).removeprefix("torch.")
            return f"the Triton ops read {allowed}, not {received}"
    if k > tuning.MAX_COLUMNS:
        return f"the Triton ops give up to {tuning.MAX_COLUMNS} columns, not {k}"
    if head > tuning.MAX_HEAD:
        return f"the Triton ops attend with heads of up to {tuning.MAX_HEAD}, not {head}"
    return None
