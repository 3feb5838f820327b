"""The KV pool: token-granular slots, and the sequences that own them.

A *slot* holds one token's keys and values in every layer. A sequence is a list of tokens and the
slots of those already computed; keeping a candidate is writing its slot number into that list.
Nothing is ever copied: sequences with a common prefix hold the same slots, counted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_NO_SLOTS = np.empty(0, dtype=np.int64)


class SlotAllocator:
    """Free list and reference counts of slots. Knows nothing of tensors or tokens."""

    def __init__(self) -> None:
        self._references = np.zeros(0, dtype=np.int32)
        self._free: list[int] = []

    @property
    def capacity(self) -> int:
        """Slots that exist, free or not."""
        return len(self._references)

    @property
    def in_use(self) -> int:
        """Slots with at least one owner."""
        return self.capacity - len(self._free)

    def grow(self, capacity: int) -> None:
        """Add free slots until there are ``capacity``; never shrinks."""
        start = self.capacity
        if capacity > start:
            self._references = np.pad(self._references, (0, capacity - start))
            # Popped from the end: low numbers first, so that fresh runs are contiguous.
            self._free[:0] = range(capacity - 1, start - 1, -1)

    def take(self, count: int) -> np.ndarray:
        """``count`` free slots, each now with one owner. The pool must have grown enough."""
        assert count <= len(self._free), "the pool grows before slots are taken"
        if count == 0:
            return _NO_SLOTS
        slots = np.array(self._free[: -count - 1 : -1], dtype=np.int64)
        del self._free[-count:]
        self._references[slots] = 1
        return slots

    def share(self, slots: np.ndarray) -> None:
        """Add one owner to each slot."""
        self._references[slots] += 1

    def release(self, slots: np.ndarray) -> None:
        """Take one owner from each slot; slots without owners become free."""
        self._references[slots] -= 1
        assert (self._references[slots] >= 0).all(), "a slot was released twice"
        freed = slots[self._references[slots] == 0]
        self._free.extend(freed[::-1].tolist())

    def available(self) -> int:
        """Free slots."""
        return len(self._free)


class KVPool:
    """Keys and values of one model: per layer ``[capacity, H_kv, D]``, grown by doubling.

    Layers are allocated when they are first written, in the shapes and dtype the model hands
    over, so no field of any config has to be interpreted.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self.slots = SlotAllocator()
        self.slots.grow(capacity)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, count: int) -> np.ndarray:
        """Allocate ``count`` slots, growing the pool if it is full."""
        missing = count - self.slots.available()
        if missing > 0:
            capacity = self.slots.capacity
            self.slots.grow(capacity + max(missing, capacity))
        return self.slots.take(count)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store ``[N, H_kv, D]`` keys and values of one layer in ``slots`` (``[N]`` int64)."""
        held = self._layers.get(layer)
        if held is None or held[0].shape[0] < self.slots.capacity:
            held = (
                self._allocate(keys, held and held[0]),
                self._allocate(values, held and held[1]),
            )
            self._layers[layer] = held
        held[0].index_copy_(0, slots, keys)
        held[1].index_copy_(0, slots, values)

    def layers(
        self, count: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the first ``count`` layers, allocated where they are not yet.

        Args:
            count: of layers.
            shape: ``H_kv`` and ``D`` of keys and of values.
            dtype: of both.
        """
        for layer in range(count):
            held = self._layers.get(layer)
            if held is None or held[0].shape[0] < self.slots.capacity:
                like = torch.empty(0, *shape, dtype=dtype)
                self._layers[layer] = (
                    self._allocate(like, held and held[0]),
                    self._allocate(like, held and held[1]),
                )
        return [self._layers[layer] for layer in range(count)]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, ``[capacity, H_kv, D]`` each."""
        return self._layers[layer]

    def _allocate(self, like: Tensor, old: Tensor | None) -> Tensor:
        new = like.new_zeros(self.slots.capacity, *like.shape[1:])
        if old is not None:
            new[: old.shape[0]] = old
        return new


class CachedSequence:
    """The tokens of one request as one model sees them.

    ``tokens[: len(slots)]`` are in the pool; the rest are *pending* and go into the next pass.
    ``branches`` holds the slots of the continuations that the last pass scored.
    """

    def __init__(self, pool: KVPool, tokens: list[int]) -> None:
        self.pool = pool
        self.tokens = list(tokens)
        self.branches: dict[tuple[int, ...], np.ndarray] = {}
        self._slots = np.empty(max(64, 2 * len(tokens)), dtype=np.int64)
        self._cached = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def slots(self) -> np.ndarray:
        """Slots of the cached tokens, in order; a view."""
        return self._slots[: self._cached]

    @property
    def pending(self) -> list[int]:
        """Tokens that no pass has seen yet."""
        return self.tokens[self._cached :]

    def append(self, *tokens: int) -> None:
        """Continue the sequence; a continuation that was just scored is kept, not recomputed."""
        slots = None if self.pending else self.branches.pop(tokens, None)
        self.tokens.extend(tokens)
        if slots is not None:
            self._extend(slots)
        self.drop_branches()

    def commit(self, slots: np.ndarray) -> None:
        """Note that the first ``len(slots)`` pending tokens now live in ``slots``."""
        self._extend(slots)

    def fork(self) -> CachedSequence:
        """A second sequence with the same tokens, sharing every slot."""
        twin = CachedSequence(self.pool, self.tokens)
        self.pool.slots.share(self.slots)
        twin._extend(self.slots)
        return twin

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on."""
        self.drop_branches()
        if length < self._cached:
            dropped = self.slots[length:]
            self._cached = length
            self.pool.slots.release(dropped)
        del self.tokens[length:]

    def drop_branches(self) -> None:
        """Give back the slots of continuations that were scored and not kept."""
        while self.branches:  # taken out first: an interrupt may lose slots, never free them twice
            _, slots = self.branches.popitem()
            self.pool.slots.release(slots)

    def close(self) -> None:
        """Give every slot back; the sequence is empty afterwards."""
        self.truncate(0)

    def _extend(self, slots: np.ndarray) -> None:
        end = self._cached + len(slots)
        if end > len(self._slots):
            self._slots = np.resize(self._slots, 2 * end)
        self._slots[self._cached : end] = slots
        self._cached = end
