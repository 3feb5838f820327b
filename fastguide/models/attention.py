"""The attention function that unmodified transformers models call, and the plan it follows.

A model loaded with ``attn_implementation="fastguide"`` hands its projected queries, keys and
values to :func:`attention`, together with the keyword ``plan`` given to ``forward``. The plan
says where the rows' keys and values go in the pool and which slots each row may see.

No mask function is registered under this name on purpose: transformers then skips building
masks ("custom attention without equivalent mask creation"), and visibility comes from the plan.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from fastguide.cache import KVPool
from fastguide.kernels.reference import TreeLayout

NAME = "fastguide"

# Keywords that transformers passes along and that change nothing here: dropout is off in
# inference, causality and positions are the plan's, the rest are hints for other backends.
_HARMLESS = frozenset(
    "dropout is_causal position_ids use_cache output_attentions output_hidden_states return_dict "
    "cache_position cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split()
)


class AttentionPlan:
    """One pass's explicit attention inputs: pool, target slots and the layout of its rows."""

    def __init__(self, pool: KVPool, targets: Tensor, layout: TreeLayout) -> None:
        """Bind a layout to a pool.

        Args:
            pool: where keys and values live.
            targets: ``[N]`` int64, the slot of each packed row.
            layout: who sees whom.
        """
        self.pool = pool
        self.targets = targets
        self.layout = layout
        requests, width = layout.rows.shape
        self.uniform = requests * width == len(targets)  # packed order is already [R, M]
        self._masks: dict[tuple[int | None, int, torch.dtype], Tensor | None] = {}

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask ``[R, 1, groups * M, L]``, or None where every row sees every slot."""
        key = (window, groups, dtype)
        if key not in self._masks:
            seen = self.layout.visible if window is None else self.layout.within(window)
            mask = None
            if not bool(seen.all()):
                mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
                mask.masked_fill_(~seen, float("-inf"))
                # Padding rows see nothing; let them see slot 0 so that softmax stays finite.
                mask[..., 0].masked_fill_(~seen.any(-1), 0.0)
                mask = mask[:, None].repeat(1, 1, groups, 1)
            self._masks[key] = mask
        return self._masks[key]


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

    Computes :func:`fastguide.kernels.reference.tree_attention` with one gather of each
    request's slots per layer: all rows and all query heads of one KV head go through
    ``scaled_dot_product_attention`` together.

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
    heads, rows, width = query.shape[1:]
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    plan.pool.write(layer, plan.targets, key[0].transpose(0, 1), value[0].transpose(0, 1))
    pool_keys, pool_values = plan.pool.layer(layer)
    layout = plan.layout
    requests, per_request = layout.rows.shape
    length = layout.slots.shape[1]

    flat = layout.slots.reshape(-1)
    k = pool_keys.index_select(0, flat).view(requests, length, kv_heads, -1).transpose(1, 2)
    v = pool_values.index_select(0, flat).view(requests, length, kv_heads, -1).transpose(1, 2)
    q = query[0].view(kv_heads, groups, rows, width)
    q = q if plan.uniform else q.index_select(2, layout.rows.reshape(-1))
    q = q.view(kv_heads, groups, requests, per_request, width)
    q = q.permute(2, 0, 1, 3, 4).reshape(requests, kv_heads, groups * per_request, width)

    mask = plan.mask(sliding_window, groups, query.dtype)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:
        logits = torch.matmul(q, k.transpose(-1, -2)).float() * (scaling or width**-0.5)
        logits = softcap * torch.tanh(logits / softcap)
        logits = logits if mask is None else logits + mask
        out = torch.matmul(torch.softmax(logits, dim=-1).to(v.dtype), v)
    out = out.view(requests, kv_heads, groups, per_request, -1)
    out = out.permute(0, 3, 1, 2, 4).reshape(requests * per_request, heads, -1)
    if not plan.uniform:
        valid = layout.valid.reshape(-1)
        packed = out.new_empty(rows, heads, out.shape[-1])
        packed[layout.rows.reshape(-1)[valid]] = out[valid]
        out = packed
    return out[None], None


AttentionInterface.register(NAME, attention)
