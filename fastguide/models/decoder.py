"""Run a transformers decoder over sequences in a KV pool: pending tokens and branches, one pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastguide.cache import CachedSequence, KVPool
from fastguide.kernels import TreeLayout
from fastguide.models.adapters import AdapterBank, Factors, in_stack
from fastguide.models.attention import AttentionPlan
from fastguide.models.fusing import fuse
from fastguide.models.packing import PackedStack, pack_linears, stack_of

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
    def cached(self) -> int:
        """Tokens before the rows of this pass."""
        return len(self.sequence.slots)

    @property
    def trunk(self) -> np.ndarray:
        """How many leading slots each row sees, beside those of its branch."""
        end = self.cached + len(self.chain)
        chain = np.arange(self.cached, end, dtype=np.int32)
        if not self.branches:
            return chain
        return np.concatenate([chain, np.full(len(self.slots) - len(chain), end, np.int32)])

    @property
    def branch(self) -> np.ndarray:
        """Where each row's branch begins; a row of the chain is a branch of its own."""
        chain = np.arange(self.cached, self.cached + len(self.chain), dtype=np.int32)
        if not self.branches:
            return chain
        sizes = np.array([len(branch) for branch in self.branches])
        starts = self.cached + len(self.chain) + np.cumsum(sizes) - sizes
        return np.concatenate([chain, np.repeat(starts, sizes).astype(np.int32)])

    @property
    def outputs(self) -> list[int]:
        """Rows whose hidden states are asked for: the branches' ends, else the chain's."""
        if not self.branches:
            return [len(self.chain) - 1]
        ends = accumulate(map(len, self.branches), initial=len(self.chain) - 1)
        return list(ends)[1:]


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
        embedding = cast(nn.Embedding, model.get_input_embeddings())
        self.vocabulary = int(embedding.weight.shape[0])
        """Token ids that the model knows."""
        self._shapes: KVPool | None = None
        self.adapters = AdapterBank(model.base_model)
        self._head: nn.Module | None = model.get_output_embeddings()
        self._stack: PackedStack | None = None
        self.weights = weights_of(model)
        """Weights that a token is multiplied with."""
        of_head = 0 if self._head is None else getattr(self._head, "weight", torch.empty(0)).numel()
        self.body_weights = self.weights - of_head
        """The same without a language model's head, which no candidate of a guide goes through."""

    def pack(self) -> None:
        """Lay the weights out for decoding on a CPU; elsewhere nothing happens.

        The model computes what it did, faster, but can no longer be trained or saved.
        """
        pack_linears(self.model)
        self._head = self.model.get_output_embeddings()
        self._stack = stack_of(self.model)

    def fuse(self) -> None:
        """Compile what is small in the layers, unless they run as a native stack."""
        if self._stack is None:
            fuse(self.model)

    @property
    def stacked(self) -> bool:
        """Whether the layers run as one native stack."""
        return self._stack is not None

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent in each part of a native stack so far; empty where there is none."""
        return {} if self._stack is None else self._stack.seconds

    def add_adapter(self, factors: Mapping[str, Factors]) -> int | None:
        """Let sequences go through a LoRA: its number for ``open``; None where it does not fit."""
        if not self.adapters.fits(factors):
            return None
        layers = None if self._stack is None else len(self._stack)
        if layers is not None and not in_stack(factors, layers):
            return None
        return self.adapters.add(factors, layers)

    def open(
        self, tokens: Sequence[int], keep: int = 0, adapter: int | None = None
    ) -> CachedSequence:
        """A new sequence; nothing is computed until it is first run.

        What the pool still has of an earlier request with the same beginning is shared, all but
        the last ``keep`` tokens. With an ``adapter`` its rows go through that one.
        """
        sequence = CachedSequence(self.pool, list(tokens), adapter)
        sequence.reuse(keep)
        return sequence

    def reserve(self, capacity: int, prefixes: bool = True) -> None:
        """Give the pool its final size; see ``KVPool.fix``."""
        self.pool.fix(capacity, self._probe(), prefixes)

    def slot_bytes(self) -> int:
        """Bytes that one token takes in the cache."""
        return self._probe().slot_bytes

    def _probe(self) -> KVPool:
        """A pool that one token went through: it shows shapes and dtypes of all layers."""
        if self._shapes is None:
            probe = self.twin()
            probe.run([probe.open([0])])
            self._shapes = probe.pool
        return self._shapes

    def prefill(
        self,
        sequences: Sequence[CachedSequence],
        keep: int = 0,
        ends: Sequence[int] | None = None,
    ) -> None:
        """Compute pending tokens in chunks, all but the last ``keep`` of each sequence.

        Args:
            sequences: to compute.
            keep: so many last tokens stay pending.
            ends: per sequence, where to stop for now: its tokens from there on stay pending, too.
        """
        stops = [len(s) - keep for s in sequences]
        if ends is not None:
            stops = [min(pair) for pair in zip(stops, ends, strict=True)]
        while True:
            batch: list[_Rows] = []
            room = PASS_TOKENS
            with self._owning(batch):
                for sequence, stop in zip(sequences, stops, strict=True):
                    cached = len(sequence.slots)
                    end = min(stop, cached + min(PREFILL_CHUNK, room))
                    if todo := sequence.tokens[cached:end]:
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
        hidden: bool = False,
    ) -> Tensor:
        """One forward pass over the pending tokens of all sequences and over their branches.

        Pending tokens are committed to the pool. Branches stay in scratch slots until the
        sequence is appended to: then the chosen one, if any, is kept and the others are freed.

        Args:
            sequences: R sequences; without branches each needs a pending token.
            branches: per sequence, the continuations to run: tuples of one or more tokens.
            hidden: return hidden states of a causal LM, too; see ``logits``.

        Returns:
            ``[n, V]`` logits or ``[n, hidden]`` hidden states at the last token of every branch,
            in order; at the last token of a sequence without branches.
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
            result = self._forward(batch, outputs=True, hidden=hidden)
        _commit(batch)
        return result

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, V]`` logits of a causal LM from hidden states ``[n, hidden]``; see ``splits``."""
        assert self._head is not None
        found: Tensor = self._head(hidden)
        return found

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
    def _forward(self, batch: list[_Rows], outputs: bool, hidden: bool = False) -> Tensor:
        ordered = sorted(batch, key=_adapter_of)
        tokens = [token for rows in ordered for token in rows.tokens]
        slots = torch.from_numpy(np.concatenate([rows.slots for rows in ordered]))
        layout, positions, starts = _layout(ordered, self.device)
        chains = not any(rows.branches for rows in ordered)
        plan = AttentionPlan(self.pool, slots.to(self.device), layout, chains)
        begin = {id(rows): int(start) for rows, start in zip(ordered, starts, strict=False)}
        keep = [begin[id(rows)] + row for rows in batch for row in rows.outputs]
        keep = keep if outputs else keep[:1]
        with self.adapters.over(self._segments(ordered)):
            return self._pass(tokens, positions, plan, keep, hidden)

    def _segments(self, ordered: list[_Rows]) -> Tensor | None:
        """Where each adapter's rows begin and end, ``[G + 1]`` int32; None if none has rows."""
        numbers = [_adapter_of(rows) for rows in ordered]
        if numbers[-1] < 0:
            return None
        sizes = np.array([len(rows.slots) for rows in ordered])
        ends = np.concatenate([[0], np.cumsum(sizes)])
        edges = np.searchsorted(numbers, np.arange(len(self.adapters) + 1))
        return torch.from_numpy(ends[edges].astype(np.int32)).to(self.device)

    def _pass(
        self,
        tokens: list[int],
        positions: np.ndarray,
        plan: AttentionPlan,
        keep: list[int],
        hidden: bool,
    ) -> Tensor:
        index, ids = (torch.tensor(n, device=self.device) for n in (keep, tokens))
        places = torch.from_numpy(positions).to(self.device)
        if self._stack is None and self._head is not None and not hidden:
            return self._whole(ids, places, plan, index)
        states = self._layers(ids, places, plan)
        every = len(keep) == len(tokens) and keep == list(range(len(keep)))
        kept = states if every else states.index_select(0, index)
        return kept if self._head is None or hidden else self.logits(kept)

    def states_of(
        self, ids: Tensor, places: Tensor, plan: AttentionPlan, segments: Tensor | None = None
    ) -> Tensor:
        """Hidden states ``[N, hidden]`` of a pass that is laid out already.

        Args:
            ids: ``[N]`` int64 tokens.
            places: ``[N]`` int64 positions.
            plan: their slots, and who sees whom.
            segments: ``[G + 1]`` int32: where each adapter's rows begin and end.
        """
        with self.adapters.over(segments):
            return self._layers(ids, places, plan)

    def logits_of(self, ids: Tensor, places: Tensor, plan: AttentionPlan) -> Tensor:
        """Logits ``[N, V]`` of a pass of a causal LM that is laid out already."""
        if self._stack is None:
            return self._whole(ids, places, plan, torch.arange(len(ids), device=ids.device))
        return self.logits(self._layers(ids, places, plan))

    def _layers(self, ids: Tensor, places: Tensor, plan: AttentionPlan) -> Tensor:
        """Hidden states ``[N, hidden]`` after the last norm."""
        if self._stack is not None:
            lora = self.adapters.stacked, self.adapters.segments
            return self._stack.run(ids, places, plan.targets, plan.layout, self.pool, *lora)
        backbone = self.model if self._head is None else self.model.base_model
        found = backbone(input_ids=ids[None], position_ids=places[None], use_cache=False, plan=plan)
        return found.last_hidden_state[0]

    def _whole(self, ids: Tensor, places: Tensor, plan: AttentionPlan, index: Tensor) -> Tensor:
        """Logits ``[n, V]`` of a causal LM, with whatever it does to them beside its head."""
        found = self.model(
            input_ids=ids[None],
            position_ids=places[None],
            use_cache=False,
            plan=plan,
            logits_to_keep=index,
        )
        return found.logits[0]

    def twin(self) -> Decoder:
        """The same model with a pool of its own, for trials; adapters left out."""
        twin = Decoder(self.model, self.context)
        twin.pool, twin._stack = KVPool(1), self._stack
        return twin

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @functools.cached_property
    def splits(self) -> bool:
        """Whether logits are what the head gives for hidden states, with nothing done to them."""
        probe = self.twin()
        whole = probe.run([probe.open([0])])
        return bool(torch.equal(probe.logits(probe.run([probe.open([0])], hidden=True)), whole))


def _adapter_of(rows: _Rows) -> int:
    adapter = rows.sequence.adapter
    return -1 if adapter is None else adapter


def weights_of(model: PreTrainedModel) -> int:
    """Weights that a token is multiplied with: all but looked-up embeddings."""
    every = sum(p.numel() for p in model.parameters())
    embedding: Any = model.get_input_embeddings().weight
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = head is not None and getattr(head, "weight", None) is embedding
    return every - (0 if tied else int(embedding.numel()))


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


def _layout(batch: list[_Rows], device: torch.device) -> tuple[TreeLayout, np.ndarray, np.ndarray]:
    """The tree of a pass, the positions of its rows, and where each sequence's rows begin."""
    rows = np.array([len(part.slots) for part in batch])
    slots = np.array([part.cached for part in batch]) + rows
    row_starts, slot_starts = (np.concatenate([[0], np.cumsum(n)]) for n in (rows, slots))
    trunk = np.concatenate([part.trunk for part in batch])
    branch = np.concatenate([part.branch for part in batch])
    ends = slots - rows - row_starts[:-1]  # own slot of a row, less its number among all rows
    positions = trunk + np.repeat(ends, rows) + np.arange(len(trunk)) - branch
    numbers = np.concatenate([n for part in batch for n in (part.sequence.slots, part.slots)])
    arrays = (numbers, slot_starts[:-1], slots, row_starts, trunk, branch)
    tensors = [torch.from_numpy(a.astype(np.int32)).to(device) for a in arrays]
    layout = TreeLayout._make([*tensors, int(slots.max()), int(rows.max())])
    return layout, positions, row_starts
