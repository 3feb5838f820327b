"""A model's weights laid out for decoding on a CPU, and its layers as one native stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastguide.cache import KVPool
from fastguide.kernels import TreeLayout
from fastguide.kernels.packed import (
    Adapters,
    NativeStack,
    PackedWeight,
    StackLayer,
    StackShape,
    available,
)

STACKED = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})
"""Backbones whose layers are what ``csrc/stack.hpp`` computes."""

_LEAST_ANGLES = 512


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed; it computes, but can be neither trained nor saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = PackedWeight(linear.weight, linear.bias)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return self.packed(x)


def pack_linears(model: nn.Module) -> None:
    """Replace all linear layers of a model by packed ones; theirs are freed as it goes.

    Those that are quantized or shared out among processes stay.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or type(child.weight.data) is not Tensor:
                continue
            if available(child.weight.dtype, child.weight.device):
                setattr(parent, name, PackedLinear(child))


class PackedStack:
    """The layers of a Llama-like backbone with packed weights, from token ids to hidden states."""

    def __init__(self, backbone: Any) -> None:
        """Take over the layers of a backbone that ``stackable`` allows."""
        config = backbone.config
        attention = backbone.layers[0].self_attn
        self._embedding = backbone.embed_tokens
        self._rotary = backbone.rotary_emb
        dtype = backbone.embed_tokens.weight.dtype
        shape = StackShape(
            dtype=dtype,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head=attention.head_dim,
            inner=config.intermediate_size,
            epsilon=config.rms_norm_eps,
            scaling=attention.scaling,
        )
        layers = [_layer(layer, config) for layer in backbone.layers]
        self._stack = NativeStack(shape, layers, _fp32(backbone.norm.weight))
        self._angles: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def __len__(self) -> int:
        return len(self._stack.layers)

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        targets: Tensor,
        layout: TreeLayout,
        pool: KVPool,
        adapters: Adapters | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[N, width]`` of ``[N]`` tokens, after the last norm; see ``NativeStack``.

        Args:
            tokens: ``[N]`` int64.
            positions: ``[N]`` int64.
            targets: ``[N]`` int64, slots of ``pool``.
            layout: who sees whom.
            pool: keys and values.
            adapters: LoRAs on the stack.
            segments: the rows of each.
        """
        shape = self._stack.shape
        layers = pool.layers(len(self._stack.layers), (shape.kv_heads, shape.head), shape.dtype)
        hidden = self._embedding(tokens)
        angles = self._cover(int(positions.max()) + 1)
        return self._stack.run(
            hidden, positions, targets, layout, layers, *angles, adapters, segments
        )

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent in each part of all passes so far, for benchmarks."""
        return self._stack.seconds

    def _cover(self, count: int) -> tuple[Tensor, Tensor]:
        """Angles of at least the first ``count`` positions, ``[positions, head]`` fp32."""
        if len(self._angles[0]) < count:
            count = max(_LEAST_ANGLES, 2 * count)
            positions = torch.arange(count)[None]
            like = torch.empty(0, dtype=torch.float32)
            cosines, sines = self._rotary(like, positions)
            self._angles = cosines[0].contiguous(), sines[0].contiguous()
        return self._angles


def stack_of(model: PreTrainedModel) -> PackedStack | None:
    """The layers of a packed model as one stack; None if they are of another kind."""
    backbone = model.base_model
    return PackedStack(backbone) if _stackable(backbone) else None


def _stackable(backbone: Any) -> bool:
    if type(backbone).__name__ not in STACKED or backbone.config.hidden_act != "silu":
        return False
    layer = backbone.layers[0]
    linears = (layer.self_attn.q_proj, layer.mlp.gate_proj)
    if not all(type(linear) is PackedLinear for linear in linears):
        return False
    turned = backbone.rotary_emb(torch.empty(0), torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1]
    return bool(turned == layer.self_attn.head_dim)


def _layer(layer: Any, config: Any) -> StackLayer:
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    window = getattr(attention, "sliding_window", None)
    if config.model_type == "mistral":  # every layer's, and in no module
        window = config.sliding_window
    return StackLayer(
        _fp32(layer.input_layernorm.weight),
        _fp32(layer.post_attention_layernorm.weight),
        [linear.packed for linear in linears],
        None if query_norm is None else _fp32(query_norm.weight),
        None if key_norm is None else _fp32(key_norm.weight),
        window or 0,
    )


def _fp32(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()
