"""Run a transformers decoder over sequences in a KV pool: pending tokens and branches, one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastguide.cache import CachedSequence, KVPool
from fastguide.kernels.reference import TreeLayout
from fastguide.models.attention import AttentionPlan

PREFILL_CHUNK = 512
"""Most pending tokens of one sequence that one pass takes: bounds the memory of a pass."""

PASS_TOKENS = 4096
"""Most rows of one prefill pass over several sequences."""

Branch = tuple[int, ...]


class _Rows(NamedTuple):
    """The rows of one sequence in a pass: a chain of pending tokens, then branches off its end."""

    sequence: CachedSequence
    chain: list[int]
    branches: list[Branch]
    slots: np.ndarray

    @property
    def tokens(self) -> list[int]:
        return [*self.chain, *(token for branch in self.branches for token in branch)]

    @property
    def positions(self) -> np.ndarray:
        start = len(self.sequence.slots)
        chain = np.arange(start, start + len(self.chain))
        if not self.branches:
            return chain
        after = start + len(self.chain)
        return np.concatenate(
            [chain, *(np.arange(after, after + len(branch)) for branch in self.branches)]
        )

    @property
    def outputs(self) -> list[int]:
        """Rows whose hidden states are asked for: the branches' ends, else the chain's."""
        if not self.branches:
            return [len(self.chain) - 1]
        ends = accumulate(map(len, self.branches), initial=len(self.chain) - 1)
        return list(ends)[1:]

    def visible(self) -> np.ndarray:
        """``[rows, rows]``: a row sees the chain and its own branch, both up to itself."""
        chain = len(self.chain)
        if not self.branches:
            return _CAUSAL[:chain, :chain]
        seen = np.eye(len(self.slots), dtype=bool)
        seen[:chain, :chain] = _CAUSAL[:chain, :chain]
        seen[chain:, :chain] = True
        start = chain
        for branch in self.branches:
            size = len(branch)
            if size > 1:
                seen[start : start + size, start : start + size] = np.tri(size, dtype=bool)
            start += size
        return seen


_CAUSAL = np.tri(PREFILL_CHUNK, dtype=bool)


class Decoder:
    """A transformers model, loaded with fastguide's attention, and its KV pool.

    The only class that calls a model. A pass returns logits for a causal LM, hidden states for a
    bare backbone.
    """

    def __init__(self, model: PreTrainedModel, context: int | None = None) -> None:
        """Wrap a model.

        Args:
            model: a causal LM (passes return logits) or a bare backbone (hidden states).
            context: most tokens of a sequence; None for no limit.
        """
        self.model = model.eval()
        self.pool = KVPool()
        self.context = context
        self.device = model.device
        self._is_lm = model.get_output_embeddings() is not None

    def open(self, tokens: Sequence[int]) -> CachedSequence:
        """A new sequence; nothing is computed until it is first run."""
        return CachedSequence(self.pool, list(tokens))

    def prefill(self, sequences: Sequence[CachedSequence], keep: int = 0) -> None:
        """Compute pending tokens in chunks, all but the last ``keep`` of each sequence."""
        while True:
            batch: list[_Rows] = []
            room = PASS_TOKENS
            with self._owning(batch):
                for sequence in sequences:
                    todo = sequence.pending
                    todo = todo[: max(0, len(todo) - keep)][: min(PREFILL_CHUNK, room)]
                    if todo:
                        batch.append(_Rows(sequence, todo, [], self.pool.take(len(todo))))
                        room -= len(todo)
                if not batch:
                    return
                self._forward(batch, outputs=False)
            _commit(batch)

    def run(
        self,
        sequences: Sequence[CachedSequence],
        branches: Sequence[Sequence[Branch]] | None = None,
    ) -> Tensor:
        """One forward pass over the pending tokens of all sequences and over their branches.

        Pending tokens are committed to the pool. Branches stay in scratch slots until the
        sequence is appended to: then the chosen one, if any, is kept and the others are freed.

        Args:
            sequences: R sequences; without branches each needs a pending token.
            branches: per sequence, the continuations to run: tuples of one or more tokens.

        Returns:
            ``[n, V]`` logits or ``[n, hidden]`` hidden states at the last token of every branch,
            in order; without branches at the last token of every sequence.
        """
        self.prefill([s for s in sequences if len(s.pending) > PREFILL_CHUNK], keep=PREFILL_CHUNK)
        batch: list[_Rows] = []
        with self._owning(batch):
            for i, sequence in enumerate(sequences):
                sequence.drop_branches()
                ends = [tuple(b) for b in branches[i]] if branches is not None else []
                chain = sequence.pending
                assert chain or ends, "a sequence needs a pending token or a branch to run"
                count = len(chain) + sum(map(len, ends))
                batch.append(_Rows(sequence, chain, ends, self.pool.take(count)))
            result = self._forward(batch, outputs=True)
        _commit(batch)
        return result

    @contextlib.contextmanager
    def _owning(self, batch: list[_Rows]) -> Iterator[None]:
        """Give the slots of ``batch`` back if what follows fails or is interrupted."""
        try:
            yield
        except BaseException:
            for rows in batch:
                self.pool.slots.release(rows.slots)
            raise

    @torch.inference_mode()
    def _forward(self, batch: list[_Rows], outputs: bool) -> Tensor:
        tokens = [token for rows in batch for token in rows.tokens]
        positions = [rows.positions for rows in batch]
        sizes = np.array([len(rows.slots) for rows in batch])
        starts = np.cumsum(sizes) - sizes
        targets = np.concatenate([rows.slots for rows in batch])
        layout = _layout(batch, positions, starts, self.device)
        keep = [int(s) + row for s, rows in zip(starts, batch, strict=True) for row in rows.outputs]
        keep = keep if outputs else keep[:1]
        index = torch.tensor(keep, device=self.device)
        arguments = {
            "input_ids": torch.tensor([tokens], device=self.device),
            "position_ids": torch.from_numpy(np.concatenate(positions))[None].to(self.device),
            "use_cache": False,
            "plan": AttentionPlan(self.pool, torch.from_numpy(targets).to(self.device), layout),
        }
        if self._is_lm:
            return self.model(**arguments, logits_to_keep=index).logits[0]
        hidden = self.model(**arguments).last_hidden_state[0]
        return hidden if len(keep) == len(tokens) else hidden.index_select(0, index)


def _commit(batch: list[_Rows]) -> None:
    """Hand the slots of a pass over: chains to their sequences, branches to scratch."""
    for sequence, chain, branches, slots in batch:
        sequence.commit(slots[: len(chain)])
        start = len(chain)
        for branch in branches:
            own = slots[start : start + len(branch)]
            if branch in sequence.branches:  # the same continuation twice: keep the first
                sequence.pool.slots.release(own)
            else:
                sequence.branches[branch] = own
            start += len(branch)


def _layout(
    batch: list[_Rows], positions: list[np.ndarray], starts: np.ndarray, device: torch.device
) -> TreeLayout:
    """Pad the rows and slots of every sequence in the batch to ``[R, M]`` and ``[R, L]``."""
    prefixes = [rows.sequence.slots for rows in batch]
    width = max(len(rows.slots) for rows in batch)
    length = max(len(p) + len(rows.slots) for p, rows in zip(prefixes, batch, strict=True))
    shape = (len(batch), width, length)
    rows_index = np.zeros(shape[:2], dtype=np.int64)
    row_positions = np.zeros(shape[:2], dtype=np.int64)
    valid = np.zeros(shape[:2], dtype=bool)
    slots = np.zeros((len(batch), length), dtype=np.int64)
    slot_positions = np.zeros((len(batch), length), dtype=np.int64)
    visible = np.zeros(shape, dtype=bool)
    for i, (rows, prefix) in enumerate(zip(batch, prefixes, strict=True)):
        n, p = len(rows.slots), len(prefix)
        rows_index[i] = starts[i]
        rows_index[i, :n] = np.arange(starts[i], starts[i] + n)
        valid[i, :n] = True
        row_positions[i, :n] = positions[i]
        # Padding points at a slot of the row's own: 0 * NaN is NaN, also behind a mask.
        slots[i], slots[i, :p], slots[i, p : p + n] = rows.slots[0], prefix, rows.slots
        slot_positions[i, :p], slot_positions[i, p : p + n] = np.arange(p), positions[i]
        visible[i, :n, :p] = True
        visible[i, :n, p : p + n] = rows.visible()
    arrays = (rows_index, valid, slots, visible, row_positions, slot_positions)
    return TreeLayout(*(torch.from_numpy(a).to(device) for a in arrays))
