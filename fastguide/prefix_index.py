"""Which prefixes of earlier requests still lie in a KV pool: a radix tree of tokens and slots.

A node holds a run of tokens and the slots of their keys and values; a path from the root is a
prefix that somebody computed. The index owns no slot: it *keeps* them (see ``SlotAllocator``), so
those that no running sequence owns are idle, and are given up, least recently used first, when
slots run short. No tensors here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from fastguide.slots import SlotAllocator


class _Node:
    """A run of tokens below its parent, the slots that hold it, and what follows it."""

    def __init__(self, tokens: np.ndarray, slots: np.ndarray, parent: _Node | None) -> None:
        self.tokens = tokens
        self.slots = slots
        self.parent = parent
        self.children: dict[int, _Node] = {}


class PrefixIndex:
    """The prefixes whose keys and values are in one pool.

    Sequences own whole paths from the root: who owns a node's slot owns all those before it. So
    the idle slots are ends of paths, but for the exceptions that ``_cut`` is for.
    """

    def __init__(self, slots: SlotAllocator) -> None:
        self._slots = slots
        self._root = _Node(np.empty(0, np.int64), np.empty(0, np.int64), None)
        # In order of use. A path is touched from its end to its beginning, so a node is always
        # more recent than those below it, and the first that nobody owns is a leaf.
        self._nodes: OrderedDict[_Node, None] = OrderedDict()

    def __len__(self) -> int:
        """How many slots it keeps."""
        return sum(len(node.slots) for node in self._nodes)

    def match(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Slots ``[n]`` int64 of the longest prefix of ``tokens`` that is in the pool.

        They are nobody's yet: whoever wants them calls ``SlotAllocator.share`` before anything
        else is done with the pool.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        found: list[np.ndarray] = []
        last = self._root
        for node, common in self._walk(wanted):
            found.append(node.slots[:common])
            last = node
        self._touch(last)
        return np.concatenate(found) if found else self._root.slots

    def insert(self, tokens: Sequence[int] | np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Keep a prefix that a sequence has computed and owns.

        Args:
            tokens: of the prefix.
            slots: ``[len(tokens)]`` int64, where their keys and values are.

        Returns:
            The slots that hold these tokens from now on: those of the index where it had them
            already, the given ones elsewhere. The sequence must own these instead of its own.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        assert len(wanted) == len(slots)
        found: list[np.ndarray] = []
        at, parent = 0, self._root
        for node, common in self._walk(wanted):
            if common < len(node.tokens) and at + common < len(wanted):
                node = self._split(node, common)
            found.append(node.slots[:common])
            at, parent = at + common, node
        if at < len(wanted):
            rest = slots[at:].copy()
            leaf = _Node(wanted[at:].copy(), rest, parent)
            parent.children[int(wanted[at])] = leaf
            self._nodes[leaf] = None
            self._slots.keep(rest)
            found.append(rest)
            parent = leaf
        self._touch(parent)
        return np.concatenate(found) if found else self._root.slots

    def evict(self, count: int) -> int:
        """Give up idle slots, least recently used first, ends of prefixes before beginnings.

        Returns:
            How many became free: ``count`` or, seldom, more; all that were idle if those are fewer.
        """
        freed, empty = 0, []
        for node in self._nodes:
            if freed == count or not self._slots.idle:
                break
            if node.children:
                continue
            owned = int(self._slots.owned(node.slots).sum())
            keep = max(owned, len(node.slots) - (count - freed))
            self._slots.forget(node.slots[keep:])
            freed += len(node.slots) - keep
            if keep:  # somebody owns its beginning, or no more was wanted
                node.tokens, node.slots = node.tokens[:keep], node.slots[:keep]
            else:
                assert node.parent is not None
                del node.parent.children[int(node.tokens[0])]  # which may now be a leaf itself
                empty.append(node)
        for node in empty:
            del self._nodes[node]
        if freed < count:
            freed += self._cut(count - freed)
        return freed

    def clear(self) -> None:
        """Forget every prefix; slots that nobody owns become free."""
        for node in self._nodes:
            self._slots.forget(node.slots)
        self._nodes.clear()
        self._root.children.clear()

    def _cut(self, count: int) -> int:
        """Give up idle slots with all that follows them, which somebody owns.

        There are such only after a fork of what was not in the tree, or after ``clear``: then a
        sequence may own an end and another copy of its beginning.
        """
        before = self._slots.idle
        for node in list(self._nodes):
            if before - self._slots.idle >= count or not self._slots.idle:
                break
            if node in self._nodes and not self._slots.owned(node.slots).all():
                assert node.parent is not None
                del node.parent.children[int(node.tokens[0])]
                below = [node]
                for each in below:
                    below += each.children.values()
                    self._slots.forget(each.slots)
                    del self._nodes[each]
        return before - self._slots.idle

    def _walk(self, tokens: np.ndarray) -> Iterator[tuple[_Node, int]]:
        """The nodes along ``tokens``, with how many of each one's tokens they have in common."""
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                return
            rest = tokens[at : at + len(child.tokens)]
            differ = np.flatnonzero(rest != child.tokens[: len(rest)])
            common = int(differ[0]) if len(differ) else len(rest)
            whole = common == len(child.tokens)
            yield child, common  # which may be cut in two meanwhile
            if not whole:
                return
            node, at = child, at + common

    def _split(self, node: _Node, length: int) -> _Node:
        """Cut a node in two; returns the first part, whose only child is the rest of it."""
        parent = node.parent
        assert parent is not None
        head = _Node(node.tokens[:length], node.slots[:length], parent)
        node.tokens, node.slots, node.parent = node.tokens[length:], node.slots[length:], head
        head.children[int(node.tokens[0])] = node
        parent.children[int(head.tokens[0])] = head
        self._nodes[head] = None
        return head

    def _touch(self, node: _Node) -> None:
        """Note that the path to ``node`` was used just now."""
        step: _Node | None = node
        while step is not None and step is not self._root:
            self._nodes.move_to_end(step)
            step = step.parent
