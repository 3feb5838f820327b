"""The prefix index and the allocator below it: laws over random histories."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastguide.cache import CachedSequence, KVPool, OutOfSlots
from fastguide.prefix_index import PrefixIndex
from fastguide.slots import SlotAllocator

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def pool(capacity: int = 40) -> KVPool:
    made = KVPool()
    made.fix(capacity, KVPool())
    return made


class Histories(RuleBasedStateMachine):
    """Sequences come, share, grow, are published, fork and go; some slots are evicted.

    ``content`` plays the part of keys and values: what was written to each slot. Keys and values
    depend on all tokens so far, and so does this.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool()
        self.index = self.pool.prefixes
        self.running: list[CachedSequence] = []
        self.content: dict[int, tuple[int, ...]] = {}

    def compute(self, sequence: CachedSequence) -> bool:
        """What a pass does: take slots for the pending tokens and write to them."""
        try:
            slots = self.pool.take(len(sequence.pending))
        except OutOfSlots:
            return False
        for i, slot in enumerate(slots, len(sequence.slots)):
            self.content[int(slot)] = tuple(sequence.tokens[: i + 1])
        sequence.commit(slots)
        return True

    @rule(tokens=TOKENS, keep=st.integers(0, 1))
    def open(self, tokens: list[int], keep: int) -> None:
        sequence = CachedSequence(self.pool, tokens)
        stop = max(0, len(tokens) - keep)
        longest = max((n for n in range(stop + 1) if self.known(tokens[:n])), default=0)
        sequence.reuse(keep)
        assert len(sequence.slots) == longest  # the longest prefix, no less and no more
        if self.compute(sequence):
            self.running.append(sequence)
        else:
            sequence.close()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=TOKENS)
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        length = len(sequence)
        sequence.append(*more)
        if not self.compute(sequence):
            sequence.truncate(length)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.running)).publish()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.running.append(data.draw(st.sampled_from(self.running)).fork())

    @precondition(lambda self: self.running)
    @rule(data=st.data(), publish=st.booleans())
    def end(self, data: st.DataObject, publish: bool) -> None:
        sequence = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if publish:
            sequence.publish()
        sequence.close()

    @rule(count=st.integers(0, 12))
    def evict(self, count: int) -> None:
        idle = self.pool.slots.idle
        freed = self.index.evict(count)
        assert freed >= min(count, idle)
        assert self.pool.slots.idle == idle - freed

    @rule()
    def clear(self) -> None:
        self.index.clear()
        assert len(self.index) == self.pool.slots.idle == 0

    def known(self, prefix: list[int]) -> bool:
        """Whether the tree holds a prefix: by its own nodes, read from the root."""
        node, at = self.index._root, 0
        while at < len(prefix):
            node = node.children.get(prefix[at])
            if node is None:
                return False
            rest = prefix[at : at + len(node.tokens)]
            if node.tokens[: len(rest)].tolist() != rest:
                return False
            at += len(rest)
        return True

    @invariant()
    def slots_in_use_are_those_that_somebody_holds(self) -> None:
        held = {int(s) for sequence in self.running for s in sequence.slots}
        kept = {int(s) for node in self.index._nodes for s in node.slots}
        slots = self.pool.slots
        assert slots.in_use == len(held)
        assert slots.idle == len(kept - held)
        assert slots.available() == slots.capacity - len(held | kept)
        assert len(self.index) == len(kept)  # no slot is in the tree twice

    @invariant()
    def every_slot_holds_what_its_sequence_says(self) -> None:
        for sequence in self.running:
            for i, slot in enumerate(sequence.slots):
                assert self.content[int(slot)] == tuple(sequence.tokens[: i + 1])

    @invariant()
    def nodes_are_ordered_and_linked(self) -> None:
        order = {node: i for i, node in enumerate(self.index._nodes)}
        for node, i in order.items():
            assert len(node.tokens) == len(node.slots) > 0
            for first, child in node.children.items():
                assert child.parent is node
                assert int(child.tokens[0]) == first
                assert order[child] < i  # so that the oldest is always a leaf


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(TOKENS, max_size=8), TOKENS)
@settings(max_examples=200, deadline=None)
def test_the_longest_prefix_of_any_earlier_request_is_found(
    earlier: list[list[int]], tokens: list[int]
) -> None:
    kept = pool(200)
    for other in earlier:
        sequence = CachedSequence(kept, other)
        sequence.commit(kept.take(len(other)))
        sequence.publish()
        sequence.close()

    def common(other: list[int]) -> int:
        same = [a == b for a, b in zip(other, tokens, strict=False)]
        return same.index(False) if False in same else len(same)

    assert kept.prefixes is not None
    assert len(kept.prefixes.match(tokens)) == max(map(common, earlier), default=0)
    assert len(kept.prefixes) == len({tuple(o[:n]) for o in earlier for n in range(1, len(o) + 1)})


def test_what_was_not_used_for_longest_goes_first_and_ends_before_beginnings() -> None:
    slots = SlotAllocator(20)
    index = PrefixIndex(slots)
    taken = {}
    for name, tokens in {"a": [1, 2, 3], "b": [1, 2, 4], "c": [7, 8]}.items():
        own = slots.take(len(tokens))
        kept = index.insert(tokens, own)
        slots.share(kept[kept != own])
        slots.release(own[kept != own])
        taken[name] = kept
    for own in taken.values():
        slots.release(own)
    assert slots.idle == 6  # 1 and 2 are there once
    index.match([1, 2, 3])
    assert index.evict(1) == 1
    assert len(index.match([1, 2, 4])) == 2  # b's end went: the least recently used leaf
    assert index.evict(2) == 2
    assert len(index.match([7, 8])) == 0
    assert index.evict(1) == 1
    assert index.match([1, 2, 3]).tolist() == taken["a"][:2].tolist()
    assert index.evict(99) == 2
    assert slots.available() == 20


def test_slots_that_somebody_holds_are_not_evicted() -> None:
    kept = pool(10)
    first = CachedSequence(kept, [1, 2, 3, 4])
    first.commit(kept.take(4))
    first.publish()
    second = CachedSequence(kept, [1, 2, 9])
    second.reuse()
    first.close()
    assert kept.slots.in_use == 2  # 1 and 2, which the second shares
    with pytest.raises(OutOfSlots, match="a pass needs 9 slots and 8 of 10 are left"):
        kept.take(9)
    assert len(kept.take(8)) == 8
    assert kept.slots.in_use == 10
    assert second.slots.tolist() == [0, 1]


def test_beginnings_go_even_where_somebody_owns_another_copy_of_them() -> None:
    kept = pool(10)
    one, other = CachedSequence(kept, [5, 6]), CachedSequence(kept, [5])
    for sequence in (one, other):
        sequence.commit(kept.take(len(sequence)))
    twin = one.fork()  # of what is not in the tree
    other.publish()
    one.publish()  # takes over the other's copy of 5
    one.close()
    other.close()
    assert kept.slots.in_use == 2
    assert kept.slots.idle == 1
    assert len(kept.take(8)) == 8
    twin.close()
    assert kept.slots.in_use == 8


def test_a_pool_without_a_size_grows() -> None:
    free = KVPool(2)
    assert free.prefixes is None
    slots = free.take(5)
    assert np.array_equal(slots, np.arange(5))
    assert free.slots.capacity >= 5
    free.slots.release(slots)
    assert free.slots.in_use == 0
