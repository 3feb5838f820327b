"""The KV pool: token-granular slots, and the sequences that own them.

A *slot* holds one token's keys and values in every layer. A sequence is a list of tokens and the
slots of those already computed; keeping a candidate is writing its slot number into that list.
Nothing is ever copied: sequences with a common prefix hold the same slots, counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastguide.prefix_index import PrefixIndex
from fastguide.slots import SlotAllocator


class OutOfSlots(RuntimeError):
    """A pool of fixed size has fewer slots than a pass needs."""


class KVPool:
    """Keys and values of one model: per layer ``[capacity, H_kv, D]``.

    Layers are allocated when they are first written, in the shapes and dtype the model hands
    over, so no field of any config has to be interpreted. A pool grows by doubling until ``fix``
    gives it a size; from then on it can keep the prefixes of earlier requests.

    Memory that no slot was written to is not initialised: it is not touched before it is used.
    Nothing may read a slot that was not written.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self.slots = SlotAllocator(capacity)
        self.prefixes: PrefixIndex | None = None
        self.reused = 0
        """Tokens of sequences that did not have to be computed, so far."""
        self.fixed = False
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def fix(self, capacity: int, like: KVPool, prefixes: bool = True) -> None:
        """Give an unused pool its final size, and allocate all of it.

        Args:
            capacity: slots.
            like: a pool that the model has written to: its layers say what to allocate.
            prefixes: keep the prefixes of earlier requests until their slots are needed.

        Raises:
            RuntimeError: there is not enough memory (``torch.OutOfMemoryError`` on GPUs).
        """
        assert self.slots.in_use == 0, "a pool is given its size before it is used"
        self.slots = SlotAllocator(capacity)
        self.prefixes = PrefixIndex(self.slots) if prefixes else None
        self.fixed = True
        self._layers = {
            layer: (_empty(keys, capacity + 2), _empty(values, capacity + 2))
            for layer, (keys, values) in like._layers.items()
        }

    @property
    def spare(self) -> int:
        """Of a fixed pool: a slot that is nobody's, for rows that nobody looks at to write to."""
        return self.slots.capacity

    @property
    def blank(self) -> int:
        """Of a fixed pool: a slot of zeros, which nobody writes to, for such rows to read."""
        return self.slots.capacity + 1

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot in all layers that were written."""
        return sum(t[0].nbytes for layer in self._layers.values() for t in layer)

    def available(self) -> int:
        """Slots that ``take`` can give without growing: free ones, and idle ones of prefixes."""
        return self.slots.available() + self.slots.idle

    def shared(self, tokens: Sequence[int], adapter: int | None = None) -> int:
        """How many of the first tokens of a request lie in slots that are in use anyway."""
        if self.prefixes is None:
            return 0
        return int(self.slots.owned(self.prefixes.match(marked(tokens, adapter))).sum())

    def take(self, count: int) -> np.ndarray:
        """Allocate ``count`` slots ``[count]`` int64: free ones, else those of old prefixes.

        Raises:
            OutOfSlots: the pool has a fixed size and too few are left.
        """
        missing = count - self.slots.available()
        if missing > 0 and self.prefixes is not None:
            missing -= self.prefixes.evict(missing)
        if missing > 0:
            capacity = self.slots.capacity
            if self.fixed:
                raise OutOfSlots(
                    f"a pass needs {count} slots and {count - missing} of {capacity} are left"
                )
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
        new = _empty(like, self.slots.capacity)
        if old is not None:
            new[: old.shape[0]] = old
        return new


@torch.inference_mode()  # as passes write to it in inference mode
def _empty(like: Tensor, capacity: int) -> Tensor:
    made = like.new_empty(capacity, *like.shape[1:])
    made[-2:] = 0  # of a fixed pool, the spare slot and the blank one
    return made


def marked(tokens: Sequence[int], adapter: int | None) -> np.ndarray:
    """Tokens ``[n]`` int64 as a prefix index knows them: those of each adapter are others."""
    return np.asarray(tokens, dtype=np.int64) + (0 if adapter is None else (adapter + 1) << 40)


class CachedSequence:
    """The tokens of one request as one model sees them.

    ``tokens[: len(slots)]`` are in the pool; the rest are *pending* and go into the next pass.
    ``branches`` holds the slots of the continuations that the last pass scored.
    """

    def __init__(self, pool: KVPool, tokens: list[int], adapter: int | None = None) -> None:
        self.pool = pool
        self.adapter = adapter
        """Which of the model's adapters its tokens go through."""
        self.tokens = list(tokens)
        self.branches: dict[tuple[int, ...], np.ndarray] = {}
        self.ahead = np.empty(0, dtype=np.int64)
        """Slots for tokens to come, in order: the first is for the first pending one."""
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

    def reserve(self, count: int) -> None:
        """Take so many more slots for tokens to come."""
        self.ahead = np.concatenate([self.ahead, self.pool.take(count)])

    def drop_ahead(self) -> None:
        """Give the slots for tokens to come back."""
        ahead, self.ahead = self.ahead, np.empty(0, dtype=np.int64)
        self.pool.slots.release(ahead)

    def advance(self, token: int) -> None:
        """Note that the pending token went to the first slot ahead, and continue with another."""
        # Taken out first: an interrupt may lose a slot, never free it twice.
        slot, self.ahead = self.ahead[:1], self.ahead[1:]
        self.commit(slot)
        self.tokens.append(token)

    def fork(self) -> CachedSequence:
        """A second sequence with the same tokens, sharing every slot."""
        twin = CachedSequence(self.pool, self.tokens, self.adapter)
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

    def reuse(self, keep: int = 0) -> None:
        """Take the longest prefix that the pool still has from earlier requests.

        Args:
            keep: how many of the last tokens stay pending even so.
        """
        if self.pool.prefixes is not None and not self._cached:
            known = marked(self.tokens[: max(0, len(self.tokens) - keep)], self.adapter)
            slots = self.pool.prefixes.match(known)
            self.pool.slots.share(slots)
            self._extend(slots)
            self.pool.reused += len(slots)

    def publish(self) -> None:
        """Let later requests reuse what is cached of this sequence, also when it has closed."""
        if self.pool.prefixes is not None and self._cached:
            own = self.slots.copy()
            known = marked(self.tokens[: len(own)], self.adapter)
            kept = self.pool.prefixes.insert(known, own)
            # Another request may have computed the same meanwhile: one copy of it is enough.
            twice = kept != own
            self.pool.slots.share(kept[twice])
            self._slots[: self._cached] = kept
            self.pool.slots.release(own[twice])

    def drop_branches(self) -> None:
        """Give back the slots of continuations that were scored and not kept."""
        if self.branches:  # taken out first: an interrupt may lose slots, never free them twice
            dropped, self.branches = self.branches, {}
            self.pool.slots.release(np.concatenate(list(dropped.values())))

    def close(self) -> None:
        """Give every slot back; the sequence is empty afterwards."""
        self.drop_ahead()
        self.truncate(0)

    def _extend(self, slots: np.ndarray) -> None:
        end = self._cached + len(slots)
        if end > len(self._slots):
            self._slots = np.resize(self._slots, 2 * end)
        self._slots[self._cached : end] = slots
        self._cached = end
