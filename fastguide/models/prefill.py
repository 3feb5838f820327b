"""Attention of prompts on a GPU: rows of many requests packed without padding, by flash kernels.

Two libraries have such kernels: PyTorch itself (``torch.nn.attention.varlen``) and the package
``flash-attn`` (extra ``flash``). Where both can do the work, each is timed once, and the faster
stays. Neither takes fp32; those prompts go through plain ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguide.kernels import TreeLayout

WIDEST_HEAD = 256
"""Numbers of a head that the kernels take at most."""


class Packed(NamedTuple):
    """Rows and slots of R requests, side by side; a row sees all slots up to its own."""

    rows: Tensor
    """``[R + 1]`` int32: where each request's rows begin."""
    slots: Tensor
    """``[R + 1]`` int32: where its slots begin; its own rows are the last of them."""
    max_rows: int
    max_slots: int

    @classmethod
    def of(cls, layout: TreeLayout) -> Packed:
        """Of a layout without branches, whose requests' slots lie side by side in order."""
        ends = torch.cumsum(layout.slot_counts, 0, dtype=torch.int32)
        slots = torch.nn.functional.pad(ends, (1, 0))
        return cls(layout.row_starts, slots, layout.max_rows, layout.max_slots)


Kernel = Callable[[Tensor, Tensor, Tensor, Packed, float, int, float], Tensor]
"""Of queries ``[N, H, D]``, keys and values ``[T, H_kv, D]`` of the slots, the scale, the window (0
is none) and the soft cap (0 is none): ``[N, H, D]``."""


@functools.lru_cache
def _torch_groups_heads() -> bool:
    """Whether PyTorch's kernel takes fewer heads of keys than of queries, as from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def by_torch(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float, window: int, cap: float
) -> Tensor:
    """PyTorch's own flash kernel; it has no soft cap."""
    from torch.nn.attention.varlen import varlen_attn

    more: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if _torch_groups_heads():
            more["enable_gqa"] = True
        else:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    sizes = packed.rows, packed.slots, packed.max_rows, packed.max_slots
    left = window - 1 if window else -1
    found = varlen_attn(query, key, value, *sizes, scale=scale, window_size=(left, 0), **more)
    assert isinstance(found, Tensor)
    return found


def by_flash_attn(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float, window: int, cap: float
) -> Tensor:
    """The package ``flash-attn``."""
    from flash_attn import flash_attn_varlen_func

    found: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        packed.rows,
        packed.slots,
        packed.max_rows,
        packed.max_slots,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1 if window else -1, 0 if window else -1),
        softcap=cap,
    )
    return found


class Heads(NamedTuple):
    """What attention a model has; kernels are chosen for it."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    width: int
    """Of a query and a key."""
    value_width: int
    capped: bool


@functools.lru_cache
def kernels_for(heads: Heads) -> dict[str, Kernel]:
    """The kernels that can take such attention, by the name of their library."""
    half = heads.dtype in (torch.float16, torch.bfloat16)
    fits = heads.width == heads.value_width <= WIDEST_HEAD and heads.width % 8 == 0
    if not (heads.device.type == "cuda" and half and fits):
        return {}
    if torch.cuda.get_device_capability(heads.device) < (8, 0):
        return {}
    found: dict[str, Kernel] = {}
    if find_spec("torch.nn.attention.varlen") and not heads.capped:
        found["torch"] = by_torch
    if find_spec("flash_attn"):
        found["flash-attn"] = by_flash_attn
    return found


@functools.lru_cache
def kernel_for(heads: Heads) -> Kernel | None:
    """The kernel for such attention, chosen once; None if there is none.

    Of two, the one that takes less time for four requests of 512 rows after as many.
    """
    found = kernels_for(heads)
    if len(found) < 2:
        return next(iter(found.values()), None)
    rows, slots, requests = 512, 1024, 4
    device, dtype = heads.device, heads.dtype
    query = torch.randn(requests * rows, heads.heads, heads.width, device=device, dtype=dtype)
    key = torch.randn(requests * slots, heads.kv_heads, heads.width, device=device, dtype=dtype)
    starts = torch.arange(requests + 1, device=device, dtype=torch.int32)
    packed = Packed(starts * rows, starts * slots, rows, slots)
    return min(found.values(), key=lambda kernel: _seconds(kernel, query, key, packed))


def _seconds(kernel: Kernel, query: Tensor, key: Tensor, packed: Packed) -> float:
    times = []
    for _ in range(5):
        torch.cuda.synchronize(query.device)
        start = time.perf_counter()
        kernel(query, key, key, packed, query.shape[-1] ** -0.5, 0, 0.0)
        torch.cuda.synchronize(query.device)
        times.append(time.perf_counter() - start)
    return min(times)


def packed_attention(
    kernel: Kernel,
    query: Tensor,
    pool_keys: Tensor,
    pool_values: Tensor,
    layout: TreeLayout,
    packed: Packed,
    scale: float,
    window: int,
    cap: float,
) -> Tensor:
    """Attention of prompts over a pool; see ``reference.tree_attention``, whose layout it takes.

    Args:
        kernel: does the work.
        query: ``[N, H, D]``.
        pool_keys: ``[slots, H_kv, D]``; those of the layout are gathered side by side.
        pool_values: the same.
        layout: without branches.
        packed: of the layout.
        scale: of the dot products.
        window: slots that a row sees at most; 0 is all.
        cap: of the products; 0 is none.
    """
    keys, values = (pool.index_select(0, layout.slots) for pool in (pool_keys, pool_values))
    return kernel(query, keys, values, packed, scale, window, cap)
