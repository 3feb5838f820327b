"""The attention function that unmodified transformers models call, and the plan it follows.

A model loaded with ``attn_implementation="fastguide"`` hands its projected queries, keys and
values to :func:`attention`, together with the keyword ``plan`` given to ``forward``. The plan
says where the rows' keys and values go in the pool and which slots each row may see.

No mask function is registered under this name on purpose: transformers then skips building
masks ("custom attention without equivalent mask creation"), and visibility comes from the plan.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from fastguide import kernels
from fastguide.cache import KVPool
from fastguide.kernels import TreeLayout, dispatch, reference
from fastguide.kernels.reference import DenseTree, dense_tree
from fastguide.models.prefill import Heads, Packed, kernel_for, packed_attention

NAME = "fastguide"

STREAM_ROWS = 128
"""Most query rows per key head (rows of a request, times heads of a group) of the GPU kernel."""

# Keywords that transformers passes along and that change nothing here: dropout is off in
# inference, causality and positions are the plan's, the rest are hints for other backends.
_HARMLESS = frozenset(
    "dropout is_causal position_ids use_cache output_attentions output_hidden_states return_dict "
    "cache_position cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split()
)


class AttentionPlan:
    """One pass's explicit attention inputs: pool, target slots and the layout of its rows."""

    def __init__(
        self,
        pool: KVPool,
        targets: Tensor,
        layout: TreeLayout,
        chains: bool = False,
        fixed: bool = False,
    ) -> None:
        """Bind a layout to a pool.

        Args:
            pool: where keys and values live.
            targets: ``[N]`` int64, the slot of each packed row.
            layout: who sees whom.
            chains: no row is on a branch, so each sees all slots of its request up to its own.
            fixed: the pass must not wait for the device, as a dense one does.
        """
        self.pool = pool
        self.targets = targets
        self.layout = layout
        self.chains = chains
        self.fixed = fixed
        self._dense: dict[tuple[int, int, torch.dtype], tuple[DenseTree, Tensor | None]] = {}

    def streams(self, query: Tensor, groups: int) -> bool:
        """Whether the tree kernel reads the pool, or a dense copy goes through PyTorch's SDPA.

        The kernel is made for few rows over long prefixes. On a GPU the many rows of a prefill
        are matrix products, which are SDPA's trade; on the CPU the kernel measured faster for any
        number of rows, so only what it cannot take goes the other way.
        """
        many = self.layout.max_rows * groups > STREAM_ROWS
        if query.is_cuda and many and not self.fixed:
            return False
        return dispatch.chosen("auto", query) is not reference

    @functools.cached_property
    def packed(self) -> Packed:
        """The layout as flash kernels take it."""
        return Packed.of(self.layout)

    def dense(
        self, window: int, groups: int, dtype: torch.dtype
    ) -> tuple[DenseTree, Tensor | None]:
        """The padded tree, and its additive mask ``[R, 1, groups * M, L]`` if one is needed."""
        key = (window, groups, dtype)
        if key not in self._dense:
            tree = dense_tree(self.layout, window)
            seen, mask = tree.visible, None
            if not bool(seen.all()):
                mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
                mask.masked_fill_(~seen, float("-inf"))
                # Padding rows see nothing; let them see slot 0 so that softmax stays finite.
                mask[..., 0].masked_fill_(~tree.valid, 0.0)
                mask = mask[:, None].repeat(1, 1, groups, 1)
            self._dense[key] = tree, mask
        return self._dense[key]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Tree attention over the plan's pool, in the calling convention of ``AttentionInterface``.

    Computes ``kernels.tree_attention``: by that kernel (see :meth:`AttentionPlan.streams`), prompts
    on a GPU by flash kernels (``prefill.py``), and what neither takes as a dense product.

    Args:
        module: the model's attention module; its ``layer_idx`` names the pool's layer.
        query: ``[1, H, N, D]``.
        key: ``[1, H_kv, N, D]``.
        value: ``[1, H_kv, N, E]``.
        attention_mask: must be None.
        plan: the pass's plan.
        scaling: factor of the dot products; ``D ** -0.5`` if None.
        sliding_window: see ``tree_attention``.
        softcap: see ``tree_attention``.
        others: anything unknown and not None is refused by name.

    Returns:
        ``[1, N, H, E]`` and None.

    Raises:
        ValueError: for a call without a plan or with an argument that cannot be honoured.
    """
    if plan is None:
        raise ValueError(
            "the 'fastguide' attention needs a plan: run the model through fastguide's Decoder, "
            "or load it with another attn_implementation"
        )
    unknown = [k for k, v in others.items() if v is not None and k not in _HARMLESS]
    if unknown or attention_mask is not None:
        names = ", ".join(unknown + ["attention_mask"] * (attention_mask is not None))
        raise ValueError(
            f"{type(module).__name__} asks its attention for {names}, which fastguide does not "
            "support; received a model with this variant, allowed are plain, grouped-query, "
            "sliding-window and soft-capped attention"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    plan.pool.write(layer, plan.targets, key[0].transpose(0, 1), value[0].transpose(0, 1))
    pool_keys, pool_values = plan.pool.layer(layer)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    window, cap = sliding_window or 0, softcap or 0.0
    if plan.streams(query, query.shape[1] // key.shape[1]):
        packed = kernels.tree_attention(
            query[0].transpose(0, 1),
            pool_keys,
            pool_values,
            plan.layout,
            scaling=scale,
            window=window,
            softcap=cap,
        )
        return packed[None], None
    if plan.chains:
        rows = query[0].transpose(0, 1)
        sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        kernel = kernel_for(Heads(query.device, query.dtype, *sizes, bool(cap)))
        if kernel is not None:
            pool = pool_keys, pool_values
            found = packed_attention(
                kernel, rows, *pool, plan.layout, plan.packed, scale, window, cap
            )
            return found[None], None
    return _dense_attention(query, pool_keys, pool_values, plan, scale, window, cap)[None], None


def _dense_attention(
    query: Tensor,
    pool_keys: Tensor,
    pool_values: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int,
    cap: float,
) -> Tensor:
    """``[N, H, E]``: one gather of each request's slots, then all its rows in one product."""
    heads, rows, width = query.shape[1:]
    kv_heads = pool_keys.shape[1]
    groups = heads // kv_heads
    tree, mask = plan.dense(window, groups, query.dtype)
    (requests, per_request), length = tree.rows.shape, tree.slots.shape[1]
    flat = tree.slots.reshape(-1)
    k = pool_keys.index_select(0, flat).view(requests, length, kv_heads, -1).transpose(1, 2)
    v = pool_values.index_select(0, flat).view(requests, length, kv_heads, -1).transpose(1, 2)
    uniform = requests * per_request == rows  # packed order is already [R, M]
    q = query[0].view(kv_heads, groups, rows, width)
    q = q if uniform else q.index_select(2, tree.rows.reshape(-1))
    q = q.view(kv_heads, groups, requests, per_request, width)
    q = q.permute(2, 0, 1, 3, 4).reshape(requests, kv_heads, groups * per_request, width)
    if not cap:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        logits = torch.matmul(q, k.transpose(-1, -2)).float() * scale
        logits = cap * torch.tanh(logits / cap)
        logits = logits if mask is None else logits + mask
        out = torch.matmul(torch.softmax(logits, dim=-1).to(v.dtype), v)
    out = out.view(requests, kv_heads, groups, per_request, -1)
    out = out.permute(0, 3, 1, 2, 4).reshape(requests * per_request, heads, -1)
    if not uniform:
        valid = tree.valid.reshape(-1)
        packed = out.new_empty(rows, heads, out.shape[-1])
        packed[tree.rows.reshape(-1)[valid]] = out[valid]
        return packed
    return out


AttentionInterface.register(NAME, attention)
