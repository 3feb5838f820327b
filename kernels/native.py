"""The native CPU ops: the calls into the C++ extension ``fastguide._C``, built from ``csrc/``.

Each function has the contract of its namesake in ``reference``, and the test of every
implementation is its test. Arguments are expected to be of the shapes and dtypes that contract
names (``checks`` does that for ``ops``); numbers inside them that would lead out of bounds raise a
``ValueError``. Results are new and contiguous. Neither the number of threads
(``torch.get_num_threads()``) nor the other rows of a call change a row's results.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .reference import GuidedSample, TreeLayout

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

HOW_TO_BUILD = "install GCC 12 or Clang 18, then run: FASTGUIDE_REQUIRE_NATIVE=1 pip install -e ."

_ISA_CODES = {"avx512": 2, "avx2": 1, "generic": 0}

ISAS = tuple(name for name, code in _ISA_CODES.items() if _C is not None and _C.supported(code))
"""The instruction sets that this machine has, best first; empty without the extension."""


def _isa_code(name: str, what: str) -> int:
    if name not in ISAS:
        raise ValueError(f"{what} must be one of {', '.join(ISAS)} on this machine, not {name!r}.")
    return _ISA_CODES[name]


_isa = ContextVar(
    "fastguide_isa",
    default=_isa_code(os.environ.get("FASTGUIDE_ISA") or ISAS[0], "FASTGUIDE_ISA") if ISAS else 0,
)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Force one of ``ISAS`` inside the ``with`` block; the default is the best, or FASTGUIDE_ISA.

    Raises:
        ValueError: this machine does not have it, or the extension is not built.
    """
    token = _isa.set(_isa_code(name, "the instruction set"))
    try:
        yield
    finally:
        _isa.reset(token)


def isa() -> int:
    """The instruction set in force, as the extension knows it."""
    return _isa.get()


def extension() -> Any:
    """The extension; see ``available``."""
    return _C


def available() -> bool:
    """Whether the extension was built for this Python and can be loaded."""
    return _C is not None


def obstacle(*tensors: Tensor) -> str | None:
    """Why the native ops cannot take these floating-point tensors, as a sentence, or None."""
    if _C is None:
        return f"the native extension is not built ({_why_not}); to build it, {HOW_TO_BUILD}"
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"the native ops read CPU tensors, not {tensor.device.type}"
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            received = str(tensor.dtype).removeprefix("torch.")
            return f"the native ops read {allowed}, not {received}"
        if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"the native ops want a stride of 1 along rows, not {tensor.stride(-1)}"
    return None


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"this op cannot run natively: {reason}.")


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, contiguous and in this dtype."""
    return (tensor if tensor.dtype is dtype else tensor.to(dtype)).contiguous()


def topk_logsumexp(
    logits: Tensor, k: int, inv_temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.topk_logsumexp``; the logits are read once, and rows may have any stride."""
    _refuse(obstacle(logits))
    rows, vocab = logits.shape
    inv_temperature = _ready(inv_temperature, torch.float32)
    values = torch.empty(rows, k, dtype=torch.float32)
    ids = torch.empty(rows, k, dtype=torch.int32)
    lse = torch.empty(rows, dtype=torch.float64)
    _C.topk_logsumexp(
        logits,
        DTYPES[logits.dtype],
        rows,
        vocab,
        logits.stride(0),
        inv_temperature,
        k,
        values,
        ids,
        lse,
        _isa.get(),
        torch.get_num_threads(),
    )
    return values, ids, lse


def guide_sample(
    logits: Tensor,
    inv_temperature: Tensor,
    values: Tensor,
    ids: Tensor,
    lse: Tensor,
    scores: Tensor,
    guide_weights: Tensor,
    *,
    count: Tensor,
    mode: Tensor,
    scale: Tensor,
    weight: Tensor,
    seed: Tensor,
    position: Tensor,
) -> GuidedSample:
    """See ``reference.guide_sample``; a row that draws a candidate does not read its logits.

    Raises:
        ValueError: a count is not 1 to K, a row with a tail has no column after its candidates,
            or a drawn id is not one of the vocabulary.
    """
    _refuse(obstacle(logits))
    rows, vocab = logits.shape
    inv_temperature = _ready(inv_temperature, torch.float32)
    values, ids = values.contiguous(), _ready(ids, torch.int32)
    lse = _ready(lse, torch.float64)
    scores = scores.contiguous()
    guide_weights = _ready(guide_weights, torch.float64)
    count = _ready(count, torch.int32)
    mode = _ready(mode, torch.int32)
    scale = _ready(scale, torch.float64)
    weight = _ready(weight, torch.float64)
    seed = _ready(seed, torch.int64)
    position = _ready(position, torch.int64)
    token = torch.empty(rows, dtype=torch.int64)
    source = torch.empty(rows, dtype=torch.int64)
    score = torch.empty(rows, dtype=torch.float32)
    logprob = torch.empty(rows, dtype=torch.float32)
    base_logprob = torch.empty(rows, dtype=torch.float32)
    kl = torch.empty(rows, dtype=torch.float32)
    _C.guide_sample(
        logits,
        DTYPES[logits.dtype],
        rows,
        vocab,
        logits.stride(0),
        inv_temperature,
        values.shape[1],
        values,
        ids,
        lse,
        scores.shape[0],
        scores,
        guide_weights,
        count,
        mode,
        scale,
        weight,
        seed,
        position,
        token,
        source,
        score,
        logprob,
        base_logprob,
        kl,
        torch.get_num_threads(),
    )
    return GuidedSample(token, source, score, logprob, base_logprob, kl)


def sample_tail(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``reference.sample_tail``; rows that need nothing are not read.

    Raises:
        ValueError: the count of a row that draws is not 0 to V - 1.
    """
    _refuse(obstacle(logits))
    rows, vocab = logits.shape
    inv_temperature = _ready(inv_temperature, torch.float32)
    count = _ready(count, torch.int32)
    fraction = _ready(fraction, torch.float64)
    token = torch.empty(rows, dtype=torch.int64)
    z = torch.empty(rows, dtype=torch.float64)
    _C.sample_tail(
        logits,
        DTYPES[logits.dtype],
        rows,
        vocab,
        logits.stride(0),
        inv_temperature,
        count,
        fraction,
        token,
        z,
        torch.get_num_threads(),
    )
    return token, z


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: TreeLayout,
    *,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """See ``reference.tree_attention``; all but the last dimension may have any stride.

    Keys and values of a request are read once per KV head and about 72 queries.

    Raises:
        ValueError: the layout points out of the pool, or out of order.
    """
    _refuse(obstacle(query, keys, values))
    rows, heads, width = query.shape
    pool, kv_heads, value_width = values.shape
    slots, slot_starts, slot_counts, row_starts, trunk, branch = (
        _ready(tensor, torch.int32) for tensor in layout[:6]
    )
    out = torch.empty(rows, heads, value_width, dtype=query.dtype)
    _C.tree_attention(
        DTYPES[query.dtype],
        rows,
        heads,
        kv_heads,
        pool,
        width,
        value_width,
        query,
        *query.stride()[:2],
        keys,
        *keys.stride()[:2],
        values,
        *values.stride()[:2],
        row_starts.shape[0] - 1,
        slots.shape[0],
        slots,
        slot_starts,
        slot_counts,
        row_starts,
        trunk,
        branch,
        scaling,
        window,
        softcap,
        out,
        _isa.get(),
        torch.get_num_threads(),
    )
    return out


def lora_rows(base: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: Tensor) -> Tensor:
    """See ``reference.lora_rows``; rows of ``base`` and ``x`` may have any stride.

    Raises:
        ValueError: the segments do not ascend from 0 at least to N at most.
    """
    _refuse(obstacle(base, x, a, b))
    rows, outputs = base.shape
    adapters, rank, inputs = a.shape
    a, b, segments = a.contiguous(), b.contiguous(), _ready(segments, torch.int32)
    out = torch.empty(rows, outputs, dtype=base.dtype)
    _C.lora_rows(
        DTYPES[base.dtype],
        rows,
        inputs,
        outputs,
        adapters,
        rank,
        base,
        base.stride(0),
        x,
        x.stride(0),
        a,
        b,
        segments,
        out,
        _isa.get(),
        torch.get_num_threads(),
    )
    return out


def td_lambda(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """See ``reference.td_lambda``; rows of ``values`` and ``rewards`` may have any stride."""
    _refuse(obstacle(values, rewards))
    rows, steps = values.shape
    mask = _ready(mask, torch.bool)
    targets = torch.empty(rows, steps, dtype=values.dtype)
    _C.td_lambda(
        DTYPES[values.dtype],
        rows,
        steps,
        values,
        values.stride(0),
        rewards,
        rewards.stride(0),
        mask,
        gamma,
        lam,
        targets,
        torch.get_num_threads(),
    )
    return targets
