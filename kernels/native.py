"""The native CPU ops: checks, outputs, and the call into the C++ extension ``fastguide._C``.

Specification: ``reference.py``. Test: ``tests/kernels/``. Source: ``csrc/``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The extension comes after torch, so that both share torch's OpenMP runtime and its threads.
try:
    import fastguide._C as _C
except ImportError as error:
    _C = None
    _why_not = str(error)
else:
    _why_not = ""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the ops read, with the code that the extension knows it by."""

HOW_TO_BUILD = "install a C++17 compiler, then run: FASTGUIDE_REQUIRE_NATIVE=1 pip install -e ."


def available() -> bool:
    """Whether the extension was built for this Python and can be loaded."""
    return _C is not None


def obstacle(logits: Tensor) -> str | None:
    """Why ``topk_logsumexp`` cannot take these logits here, as a sentence, or None if it can."""
    if _C is None:
        return f"the native extension is not built ({_why_not}); to build it, {HOW_TO_BUILD}"
    if logits.device.type != "cpu":
        return f"the native ops read CPU tensors, not {logits.device.type}"
    if logits.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        received = str(logits.dtype).removeprefix("torch.")
        return f"the native ops read {allowed}, not {received}"
    if logits.requires_grad and torch.is_grad_enabled():
        return "the native ops have no gradient: call them under torch.no_grad()"
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return f"the native ops want a stride of 1 along the vocabulary, not {logits.stride(1)}"
    return None


def topk_logsumexp(
    logits: Tensor, k: int, inv_temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.topk_logsumexp`` on CPU, reading the logits once.

    Rows are shared out among ``torch.get_num_threads()`` threads; few rows are split along the
    vocabulary. The log-sum-exp may differ in its last bit with the number of threads, values and
    ids never do. A row that holds a NaN gets lse NaN, and unspecified values and ids.

    Args:
        logits: ``[N, V]`` fp32, bf16 or fp16 on CPU, V at least 1, any stride between rows, 1
            along them; -inf allowed.
        k: how many to return, at least 1.
        inv_temperature: ``[N]`` fp32 on CPU, positive and finite.

    Returns:
        values ``[N, k]`` fp32, ids ``[N, k]`` int32, lse ``[N]`` fp64, new and contiguous.

    Raises:
        ValueError: the extension is not built, or an argument is not as described.
    """
    reason = obstacle(logits)
    if reason is not None:
        raise ValueError(f"topk_logsumexp cannot run natively: {reason}.")
    rows, vocab = logits.shape
    inv_temperature = inv_temperature.detach().contiguous()
    values = torch.empty(rows, k, dtype=torch.float32)
    ids = torch.empty(rows, k, dtype=torch.int32)
    lse = torch.empty(rows, dtype=torch.float64)
    _C.topk_logsumexp(
        logits.data_ptr(),
        inv_temperature.data_ptr(),
        values.data_ptr(),
        ids.data_ptr(),
        lse.data_ptr(),
        rows=rows,
        vocab=vocab,
        row_stride=logits.stride(0),
        k=k,
        dtype=DTYPES[logits.dtype],
        threads=torch.get_num_threads(),
    )
    return values, ids, lse
