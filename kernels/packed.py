"""Models on a CPU: weights packed once for the native extension, and whole stacks of layers.

What PyTorch does for a linear layer with few rows is mostly waiting for memory; packed weights are
read in one stream, each once. There is no other implementation: where the extension cannot run,
models keep their own layers (``available``), and these are the specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .native import DTYPES
from .reference import TreeLayout

PARTS = ("products", "lora", "attention", "rows")
"""Of a pass; ``rows`` are norms, rotations and gates."""

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


def available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this dtype on this device can be packed."""
    return native.available() and device.type == "cpu" and dtype in DTYPES


class PackedWeight:
    """A weight ``[outputs, inputs]`` in the layout of ``csrc/linear.hpp``, and its bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Pack ``weight``; it is not needed afterwards.

        Raises:
            ValueError: the extension cannot take it.
        """
        if not available(weight.dtype, weight.device):
            raise ValueError(f"cannot pack a weight of {weight.dtype} on {weight.device}")
        weight = weight.detach()
        weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        self.dtype = weight.dtype
        self.outputs, self.inputs = weight.shape
        code = DTYPES[weight.dtype]
        words = native.extension().packed_words(code, self.inputs, self.outputs)
        self.words = torch.empty(words, dtype=torch.int32)
        self.bias = None if bias is None else bias.detach().float().contiguous()
        native.extension().pack_weight(
            code,
            self.inputs,
            self.outputs,
            weight,
            weight.stride(0),
            self.words,
            torch.get_num_threads(),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]`` in the dtype of ``x``; sums are fp32."""
        rows = x.reshape(-1, self.inputs).float().contiguous()
        out = torch.empty(rows.shape[0], self.outputs, dtype=torch.float32)
        native.extension().packed_linear(
            DTYPES[self.dtype],
            rows.shape[0],
            self.inputs,
            self.outputs,
            rows,
            self.words,
            address(self.bias),
            out,
            native.isa(),
            torch.get_num_threads(),
        )
        return out.to(x.dtype).view(*x.shape[:-1], self.outputs)


@dataclass(frozen=True)
class StackLayer:
    """One decoder layer; norms are fp32."""

    input_norm: Tensor
    attention_norm: Tensor
    projections: Sequence[PackedWeight]
    """In the order of ``PROJECTIONS``."""
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    window: int = 0


@dataclass(frozen=True)
class StackShape:
    """Sizes that all layers share."""

    dtype: torch.dtype
    width: int
    heads: int
    kv_heads: int
    head: int
    inner: int
    epsilon: float
    scaling: float


@dataclass(frozen=True)
class Adapters:
    """The LoRAs of a stack: per layer and projection, in that order, factors of all adapters.

    See ``pack_factors``; None where no adapter has a part.
    """

    rank: int
    """Of the packed factors."""
    a: Sequence[Tensor | None]
    b: Sequence[Tensor | None]
    addresses: tuple[list[int], list[int]] = field(init=False)

    def __post_init__(self) -> None:
        found = tuple([address(tensor) for tensor in part] for part in (self.a, self.b))
        object.__setattr__(self, "addresses", found)


def takes_lora(outputs: int) -> bool:
    """Whether a stack can add a LoRA to a projection of so many outputs."""
    return outputs % native.extension().pad == 0


def pack_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of one projection in the layout of ``PackedLora`` (``csrc/lora.hpp``).

    Args:
        a: ``[G, rank, inputs]`` fp32.
        b: ``[G, outputs, rank]`` fp32, scaled; see ``takes_lora`` for the outputs.

    Returns:
        ``[G, inputs, padded]`` and ``[G, padded, outputs]``, the rank filled up with zeros.
    """
    more = -a.shape[1] % native.extension().pad
    return (
        F.pad(a.transpose(1, 2), (0, more)).contiguous(),
        F.pad(b.transpose(1, 2), (0, 0, 0, more)).contiguous(),
    )


class NativeStack:
    """Layers from the embedded tokens to the last norm, in one call into the extension."""

    def __init__(self, shape: StackShape, layers: Sequence[StackLayer], last_norm: Tensor) -> None:
        """Hand the layers over; their tensors are kept."""
        self.shape = shape
        self.layers = list(layers)
        self._last_norm = last_norm
        self.seconds = dict.fromkeys(PARTS, 0.0)
        """Time spent in each part of all passes so far, for benchmarks."""
        self._stack = native.extension().Stack(
            DTYPES[shape.dtype],
            shape.width,
            shape.heads,
            shape.kv_heads,
            shape.head,
            shape.inner,
            shape.epsilon,
            shape.scaling,
            [_numbers(layer) for layer in layers],
            last_norm,
        )

    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        targets: Tensor,
        layout: TreeLayout,
        pool: Sequence[tuple[Tensor, Tensor]],
        cosines: Tensor,
        sines: Tensor,
        adapters: Adapters | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """All layers over the rows of a tree.

        Args:
            hidden: ``[N, width]``, embedded tokens, contiguous, of the stack's dtype.
            positions: ``[N]`` int64.
            targets: ``[N]`` int64: the slot of each row.
            layout: who sees whom; see ``reference.TreeLayout``.
            pool: of each layer keys and values, ``[slots, kv_heads, head]`` each; written.
            cosines: ``[angles, head]`` fp32, of the rotary embedding.
            sines: the same.
            adapters: LoRAs of some of the rows.
            segments: ``[G + 1]`` int32: adapter g works on the rows from ``segments[g]``; None if
                none works on any.

        Returns:
            ``[N, width]`` after the last norm, in the dtype of ``hidden``.

        Raises:
            ValueError: a number leads out of its array.
        """
        out = torch.empty_like(hidden)
        adapters = None if segments is None else adapters
        a, b = adapters.addresses if adapters is not None else ([], [])
        seconds = self._stack.run(
            hidden.shape[0],
            hidden,
            positions,
            targets,
            layout.row_starts.shape[0] - 1,
            layout.slots.shape[0],
            *layout[:6],
            pool[0][0].shape[0],
            [keys.data_ptr() for keys, _ in pool],
            [values.data_ptr() for _, values in pool],
            0 if adapters is None or segments is None else segments.shape[0] - 1,
            0 if adapters is None else adapters.rank,
            address(segments),
            a,
            b,
            cosines.shape[0],
            cosines,
            sines,
            out,
            native.isa(),
            torch.get_num_threads(),
        )
        for part, spent in zip(PARTS, seconds, strict=True):
            self.seconds[part] += spent
        return out


def address(tensor: Tensor | None) -> int:
    """Where the elements are; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _numbers(layer: StackLayer) -> list[int]:
    """What ``layer_of`` in ``csrc/bindings_models.cpp`` reads."""
    numbers = [
        address(layer.input_norm),
        address(layer.attention_norm),
        address(layer.query_norm),
        address(layer.key_norm),
        layer.window,
    ]
    for weight in layer.projections:
        numbers += [weight.inputs, weight.outputs, address(weight.words), address(weight.bias)]
    return numbers
