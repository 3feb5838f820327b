"""Which slots of a KV pool are free, owned or kept for later. Knows nothing of tensors or tokens.

A slot is *in use* while somebody owns it. The prefix index may *keep* slots: those become *idle*
when their last owner goes, instead of free, and may be owned again or forgotten.
"""

from __future__ import annotations

import numpy as np

_NO_SLOTS = np.empty(0, dtype=np.int64)


class SlotAllocator:
    """Reference counts of a fixed number of slots, and those that are free."""

    def __init__(self, capacity: int = 0) -> None:
        self._references = np.zeros(capacity, dtype=np.int32)
        self._kept = np.zeros(capacity, dtype=bool)
        # Slots that were given back lie on a stack; from ``_fresh`` on none was ever taken. Those
        # of the stack go first: memory that was touched is used again before more is touched.
        self._stack = np.empty(capacity, dtype=np.int64)
        self._returned = 0
        self._fresh = 0
        self._idle = 0

    @property
    def capacity(self) -> int:
        """Slots that exist, free or not."""
        return len(self._references)

    @property
    def idle(self) -> int:
        """Slots without an owner that are kept for later."""
        return self._idle

    @property
    def in_use(self) -> int:
        """Slots with at least one owner."""
        return self.capacity - self.available() - self._idle

    def available(self) -> int:
        """Free slots."""
        return self._returned + self.capacity - self._fresh

    def grow(self, capacity: int) -> None:
        """Add free slots until there are ``capacity``; never shrinks."""
        more = capacity - self.capacity
        if more > 0:
            self._references = np.pad(self._references, (0, more))
            self._kept = np.pad(self._kept, (0, more))
            self._stack = np.pad(self._stack, (0, more))

    def take(self, count: int) -> np.ndarray:
        """``count`` free slots ``[count]`` int64, each now with one owner; so many must be free."""
        assert count <= self.available(), "room is made before slots are taken"
        if count == 0:
            return _NO_SLOTS
        again = min(count, self._returned)
        slots = np.empty(count, dtype=np.int64)
        slots[:again] = self._stack[self._returned - again : self._returned][::-1]
        slots[again:] = np.arange(self._fresh, self._fresh + count - again)
        self._returned -= again
        self._fresh += count - again
        self._references[slots] = 1
        return slots

    def share(self, slots: np.ndarray) -> None:
        """Add one owner to each of ``slots``, which are in use or idle."""
        self._idle -= int((self._references[slots] == 0).sum())
        self._references[slots] += 1

    def release(self, slots: np.ndarray) -> None:
        """Take one owner from each slot; those without owners become idle if kept, else free."""
        self._references[slots] -= 1
        left = self._references[slots]
        assert (left >= 0).all(), "a slot was released twice"
        self._let_go(slots[left == 0])

    def keep(self, slots: np.ndarray) -> None:
        """Keep slots that are in use: they will become idle, not free."""
        self._kept[slots] = True

    def forget(self, slots: np.ndarray) -> None:
        """Keep these slots no longer; the idle ones among them become free."""
        self._kept[slots] = False
        idle = slots[self._references[slots] == 0]
        self._idle -= len(idle)
        self._let_go(idle)

    def owned(self, slots: np.ndarray) -> np.ndarray:
        """Which of ``slots`` have an owner: ``[n]`` bool."""
        return self._references[slots] > 0

    def _let_go(self, slots: np.ndarray) -> None:
        """Put slots without owners where they belong."""
        kept = self._kept[slots]
        freed = slots[~kept][::-1]
        self._idle += len(slots) - len(freed)
        self._stack[self._returned : self._returned + len(freed)] = freed
        self._returned += len(freed)
