"""LoRA guides on the policy's own weights: in one pass some rows go through an adapter, others not.

The rows of a pass are ordered by adapter, those without one first; ``segments`` says where each
adapter's rows begin.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fastguide import kernels
from fastguide.kernels.packed import PROJECTIONS, Adapters, pack_factors, takes_lora

_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}
"""What the config of an adapter says that is two factors for each of its layers, and no more."""

_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."

_PLACES = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
"""Modules of a Llama-like layer, by the names of ``PackedStack``'s projections."""


class Factors(NamedTuple):
    """What an adapter adds to one linear layer: ``b a x``."""

    a: Tensor
    """``[rank, inputs]`` fp32."""
    b: Tensor
    """``[outputs, rank]`` fp32, scaled."""


def read_adapter(folder: Path, config_file: str, weights_file: str) -> dict[str, Factors] | None:
    """The factors of a LoRA by the name of the module in its backbone.

    Returns:
        None if the adapter is more than two factors for each of some linear layers, or cannot be
        read: then it has to be merged, or who tries to says what is wrong.
    """
    try:
        config = json.loads((folder / config_file).read_text(encoding="utf-8"))
        state = load_file(folder / weights_file)
    except (OSError, ValueError, SafetensorError):
        return None
    if any(config.get(key, allowed[0]) not in allowed for key, allowed in _PLAIN.items()):
        return None
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    names = {key.removesuffix(_A).removesuffix(_B) for key in state}
    if set(state) != {name + end for name in names for end in (_A, _B)}:
        return None
    if not all(name.startswith(_PREFIX) for name in names):
        return None
    return {
        name.removeprefix(_PREFIX): Factors(
            state[name + _A].float(), (state[name + _B].float() * scale).contiguous()
        )
        for name in names
    }


class AdapterBank:
    """All adapters of one backbone, and which rows of a pass are whose."""

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone
        self._adapters: list[Mapping[str, Factors]] = []
        self._wrapped: dict[str, LoraLinear] = {}
        self.stacked: Adapters | None = None
        """All of them, for a native stack."""
        self.rank = 0
        self.segments: Tensor | None = None
        """``[G + 1]`` int32 during a pass that has rows with adapters."""

    def __len__(self) -> int:
        return len(self._adapters)

    def fits(self, factors: Mapping[str, Factors]) -> bool:
        """Whether every module that an adapter names is a linear layer of its size."""
        for name, (a, b) in factors.items():
            try:
                linear = self._linear(name)
            except AttributeError:
                return False
            sizes = (getattr(linear, "in_features", 0), getattr(linear, "out_features", 0))
            if sizes != (a.shape[1], b.shape[0]) or not _divisible(linear):
                return False
        return True

    def add(self, factors: Mapping[str, Factors], layers: int | None) -> int:
        """Take an adapter; returns its number.

        Args:
            factors: of ``read_adapter``; they fit.
            layers: of the native stack that runs them; None if the backbone's own modules do.
        """
        self._adapters.append(factors)
        self.rank = max(len(f.a) for adapter in self._adapters for f in adapter.values())
        names = dict.fromkeys(name for adapter in self._adapters for name in adapter)
        if layers is not None:
            places = [f"layers.{i}.{place}" for i in range(layers) for place in _ordered()]
            empty = (None, None)
            pairs = [pack_factors(*self._stack(n)) if n in names else empty for n in places]
            rank = next(a.shape[2] for a, _ in pairs if a is not None)
            self.stacked = Adapters(rank, [a for a, _ in pairs], [b for _, b in pairs])
        else:
            for name in names:
                if name not in self._wrapped:
                    parent, _, child = name.rpartition(".")
                    self._wrapped[name] = LoraLinear(self._linear(name), self)
                    setattr(self._backbone.get_submodule(parent), child, self._wrapped[name])
                self._wrapped[name].take(*self._stack(name))
        return len(self._adapters) - 1

    @contextlib.contextmanager
    def over(self, segments: Tensor | None) -> Iterator[None]:
        """Say for the duration of a pass which rows are whose; None: no row has an adapter."""
        assert self.segments is None, "a pass runs within another one"
        self.segments = segments
        try:
            yield
        finally:
            self.segments = None

    def _linear(self, name: str) -> Any:
        found = self._backbone.get_submodule(name)
        return found.linear if isinstance(found, LoraLinear) else found

    def _stack(self, name: str) -> tuple[Tensor, Tensor]:
        """Factors of all adapters for one module: ``[G, rank, inputs]``, ``[G, outputs, rank]``."""
        linear = self._linear(name)
        sizes = linear.in_features, linear.out_features
        a, b = [], []
        for adapter in self._adapters:
            mine = adapter.get(name) or Factors(torch.zeros(0, sizes[0]), torch.zeros(sizes[1], 0))
            more = self.rank - len(mine.a)
            a.append(F.pad(mine.a, (0, 0, 0, more)))
            b.append(F.pad(mine.b, (0, more)))
        return torch.stack(a), torch.stack(b)


def _divisible(linear: Any) -> bool:
    """Whether factors can be shared out as a layer is, if it is."""
    weight = getattr(linear, "weight", None)
    return not isinstance(weight, DTensor) or len(weight.placements) == 1


def in_stack(factors: Mapping[str, Factors], layers: int) -> bool:
    """Whether a native stack of so many layers has a place for all of an adapter."""
    places = {f"layers.{i}.{place}" for i in range(layers) for place in _PLACES}
    fitting = all(takes_lora(len(f.b)) for f in factors.values())
    return fitting and places.issuperset(factors)


def _ordered() -> list[str]:
    """The modules of a layer in the order of ``PROJECTIONS``."""
    return sorted(_PLACES, key=lambda place: PROJECTIONS.index(_PLACES[place]))


class LoraLinear(nn.Module):
    """A linear layer of a model without a native stack, with the adapters of the pass.

    Where the layer is shared out among processes, so are the factors: ``b`` by the outputs that a
    rank computes, or ``a`` by the inputs that it has, and then all ranks' products are added up.
    """

    def __init__(self, linear: nn.Module, bank: AdapterBank) -> None:
        super().__init__()
        self.linear = linear
        self._bank = (bank,)  # not a module of this one
        self._factors: tuple[Tensor, Tensor] | None = None
        weight = linear._parameters["weight"]
        self._shared = weight if isinstance(weight, DTensor) else None
        self.in_features = int(linear.in_features)  # type: ignore[arg-type]
        self.out_features = int(linear.out_features)  # type: ignore[arg-type]

    def take(self, a: Tensor, b: Tensor) -> None:
        """Take over the factors of all adapters."""
        if self._shared is not None:
            (placement,), mesh = self._shared.placements, self._shared.device_mesh
            if placement.is_shard(0):
                b = distribute_tensor(b, mesh, [Shard(1)], src_data_rank=None).to_local()
            elif placement.is_shard(1):
                a = distribute_tensor(a, mesh, [Shard(2)], src_data_rank=None).to_local()
        self._factors = a.contiguous(), b.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, or this rank's share of them."""
        base: Tensor = self.linear(x)
        segments = self._bank[0].segments
        if segments is None or self._factors is None:
            return base
        if self._factors[0].device != x.device or self._factors[0].dtype != x.dtype:
            a, b = self._factors
            self._factors = a.to(x.device, x.dtype), b.to(x.device, x.dtype)
        rows = base.reshape(-1, base.shape[-1]), x.reshape(-1, x.shape[-1])
        if self._shared is not None and self._shared.placements[0].is_shard(1):
            added = kernels.lora_rows(torch.zeros_like(rows[0]), rows[1], *self._factors, segments)
            dist.all_reduce(added, group=self._shared.device_mesh.get_group())
            return base + added.view(base.shape)
        return kernels.lora_rows(*rows, *self._factors, segments).view(base.shape)
