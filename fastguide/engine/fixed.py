"""What the device does in a step of fixed shapes, from numbers that are on the device already.

Everything a step reads and writes is allocated once; ``program.py`` is the host's side of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastguide.engine.sampler import Candidates, RowBatch, draw, top_candidates
from fastguide.kernels import TreeLayout
from fastguide.models.attention import AttentionPlan
from fastguide.models.decoder import Decoder
from fastguide.models.loading import one_line
from fastguide.scorer import TreeScorer


class Group(NamedTuple):
    """Tracks of one decoder that go through it together: one per guide, or the policy's."""

    decoder: Decoder
    guides: list[str | None]
    """In the order of their adapters; None is the policy."""
    rows: int
    """Of a lane in a pass: its last token, and its candidates, if any."""
    tables: Tensor
    """``[T, B, L]`` int32."""
    segments: Tensor | None
    """Of the rows of each adapter."""


class Captured(NamedTuple):
    """A step as a graph, and what it leaves beside its numbers."""

    graph: torch.cuda.CUDAGraph
    candidates: Candidates
    scores: Tensor


class FixedStep:
    """A step of ``lanes`` lanes with up to ``width`` candidates, whoever is in them."""

    def __init__(
        self,
        policy: Decoder,
        scorers: Mapping[str, TreeScorer],
        lanes: int,
        width: int,
        length: int,
        leapers: Collection[str],
        batch: RowBatch,
    ) -> None:
        """Allocate all that a step reads and writes.

        Args:
            policy: its pool is fixed, and so are those of the guides; see ``KVPool.fix``.
            scorers: guides on the policy's device.
            lanes: B.
            width: K, most candidates that guides read.
            length: L, most tokens of a lane, candidates included.
            leapers: guides on the policy's weights whose rows leap.
            batch: parameters of lanes that nobody is in, with a mass.
        """
        self.policy, self.scorers = policy, dict(scorers)
        self.lanes, self.width = lanes, width
        self.leapers = frozenset(leapers)
        device = policy.device
        self.length = torch.ones(lanes, dtype=torch.int64, device=device)
        self.token = torch.zeros(lanes, dtype=torch.int64, device=device)
        """Of each lane the last."""
        self.taken = torch.zeros(lanes, dtype=torch.bool, device=device)
        """Whether a lane has a row; others stay as they are."""
        self.reads = torch.zeros(lanes, dtype=torch.int64, device=device)
        """How many of its candidates the policy reads."""
        self.open = torch.zeros(lanes, dtype=torch.bool, device=device)
        self.batch = batch
        self.groups = self._grouped(length)
        own = self.groups[0]
        self._first = own._replace(guides=[None], rows=1, tables=own.tables[:1], segments=None)
        """The policy's last tokens."""
        self._logits: Tensor | None = None
        """``[B, V]``, of open lanes."""
        self.candidates: Candidates | None = None
        """Of the last step."""
        self.scores: Tensor | None = None
        """``[G, B, columns]`` of the last step."""
        self._numbers = torch.zeros(8, lanes, dtype=torch.float64, device=device)
        self.graphs: dict[bool, Captured] = {}
        """By whether the policy reads last tokens first."""
        self._capturable = True

    def clear(self, lanes: Sequence[int]) -> None:
        """Have lanes read and write slots that are nobody's: others may get theirs."""
        at = torch.tensor(lanes, device=self.length.device)
        for group in self.groups:
            group.tables[:, at] = group.decoder.pool.blank
        self.length[at], self.token[at] = 1, 0
        self.reads[at], self.open[at], self.taken[at] = 0, False, False

    def enter(
        self, lanes: Sequence[int], lengths: list[int], tokens: list[int], reads: list[int]
    ) -> None:
        """Put rows into lanes: their numbers of tokens, last tokens, and what the policy reads."""
        numbers = torch.tensor([list(lanes), lengths, tokens, reads], dtype=torch.int64)
        at, *rest = numbers.to(self.length.device)
        self.length[at], self.token[at], self.reads[at] = rest
        self.taken[at] = True

    def parametrize(self, batch: RowBatch) -> None:
        """Write parameters of all lanes over those that are held, which graphs read."""
        names = "count mode scale weight inv_temperature seed mass guide_weights"
        for name in names.split():
            getattr(self.batch, name).copy_(getattr(batch, name))

    def launch(self, first: bool) -> tuple[Tensor, torch.cuda.Event | None]:
        """Have the device begin a step: on a GPU by its graph, captured when it is first wanted.

        Args:
            first: whether the policy reads the last tokens first, for lanes that are not open.

        Returns:
            ``[8, B]`` fp64 on the host, once the event has come: the columns of ``GuidedSample``,
            the number of candidates, and whether the lane is open.
        """
        if self.policy.device.type != "cuda":
            self.candidates, self.scores = self._compute(first)
            return self._numbers.clone(), None
        with torch.cuda.device(self.policy.device):  # graphs and events are the current device's
            if (captured := self._captured(first)) is not None:
                captured.graph.replay()
                self.candidates, self.scores = captured.candidates, captured.scores
            else:
                self.candidates, self.scores = self._compute(first)
            numbers = torch.empty(8, self.lanes, dtype=torch.float64, pin_memory=True)
            numbers.copy_(self._numbers, non_blocking=True)
            there = torch.cuda.Event()
            there.record()
        return numbers, there

    def _captured(self, first: bool) -> Captured | None:
        """The graph of a step; None if the step cannot be one."""
        if first not in self.graphs and self._capturable:
            try:
                self.graphs[first] = self._capture(first)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # something in a model waits for the device
                self._capturable = False
                warnings.warn(
                    f"steps are not replayed as CUDA graphs: {one_line(error)}", stacklevel=2
                )
        return self.graphs.get(first)

    def _capture(self, first: bool) -> Captured:
        """The step as a graph; the lanes are left as they were."""
        device, state = self.policy.device, [self.length, self.token, self.open]
        if self._logits is not None:
            state.append(self._logits)
        held = [column.clone() for column in state]
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # kernels are compiled, and libraries take their memory
            for _ in range(2):
                self._compute(first)
                for column, before in zip(state, held, strict=True):
                    column.copy_(before)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            left = self._compute(first)
        return Captured(graph, *left)

    @torch.inference_mode()
    def _compute(self, first: bool) -> tuple[Candidates, Tensor]:
        """The step itself: nothing in it depends on numbers that only the device has.

        Args:
            first: whether the policy reads the last tokens first, for lanes that are not open.

        Returns:
            the candidates, and what guides say of them, ``[G, B, columns]`` fp32.
        """
        logits = self._policy_logits(first)
        candidates = top_candidates(logits, self.batch)
        batch = self.batch.narrowed(candidates)
        last, ids = self.token[:, None], candidates.ids[:, : self.width].long()
        asked = torch.arange(ids.shape[1], device=ids.device) < batch.count[:, None]
        # In place of others the last token: a row must not see NaN that it did not ask for.
        ids = torch.where(asked & (ids >= 0), ids, last)
        tokens = torch.cat([last, ids], 1)
        states: dict[str | None, Tensor] = {}
        for group in self.groups:
            if group.rows > 1:
                hidden = self._pass(group, tokens).view(len(group.guides), *tokens.shape, -1)
                states.update(zip(group.guides, hidden, strict=True))
        scores = candidates.values.new_zeros(
            len(self.scorers), *candidates.values.shape, dtype=torch.float32
        )
        for g, (name, scorer) in enumerate(self.scorers.items()):
            read = states[name if name in states else None][:, 1:]
            values = scorer.values(read.flatten(0, 1)).view(ids.shape)
            # A token that the guide does not know has no score, which its row is told.
            values = values.masked_fill(ids >= scorer.vocabulary, float("nan"))
            used = batch.guide_weights[g] != 0
            scores[g, :, : ids.shape[1]] = torch.where(used[:, None] & asked, values, 0.0)
        drawn = draw(logits, candidates, scores, batch, self.length)
        moves = (drawn.token >= 0) & self.taken
        if self.leapers:
            self.open.copy_((drawn.source >= 0) & (drawn.source < self.reads))
            place = (drawn.source.long() + 1).clamp(0, ids.shape[1])
            at = place[:, None, None].expand(-1, 1, states[None].shape[-1])
            assert self._logits is not None
            self._logits.copy_(self.policy.logits(states[None].gather(1, at)[:, 0]))
        columns = [column.double() for column in (*drawn, batch.count, self.open)]
        self._numbers.copy_(torch.stack(columns))
        self.token.copy_(torch.where(moves, drawn.token, self.token))
        self.length.add_(moves.long())
        return candidates, scores

    def _policy_logits(self, first: bool) -> Tensor:
        """``[B, V]``: of last tokens read now, unless the lane is open."""
        if not first:
            assert self._logits is not None
            return self._logits
        fresh = self._pass(self._first, self.token[:, None])
        if not self.leapers:
            return fresh
        if self._logits is None:
            self._logits = fresh.clone()
        return torch.where(self.open[:, None], self._logits, fresh)

    def _pass(self, group: Group, tokens: Tensor) -> Tensor:
        """One pass of a group over ``tokens`` ``[B, R]`` of every lane.

        Returns:
            hidden states in order; of a group of one row for each lane, the policy's logits.
        """
        tracks, lanes, length = group.tables.shape
        rows = group.rows
        # Lanes that do not use a guide go through it all the same, within what it knows.
        tokens = tokens[:, :rows].clamp(max=group.decoder.vocabulary - 1)
        step = torch.arange(rows, device=tokens.device)
        last = self.length[:, None] - 1
        index = last + step  # of each row's own slot
        places = last + (step > 0)  # its position: candidates are all next
        trunk, branch = last + (step > 0), torch.where(step > 0, index, last)
        slots = group.tables.gather(2, index.expand(tracks, lanes, rows))
        requests = torch.arange(tracks * lanes + 1, device=tokens.device, dtype=torch.int32)

        def of_all(columns: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
            return columns.expand(tracks, *columns.shape).reshape(-1).to(dtype)

        layout = TreeLayout(
            slots=group.tables.view(-1),
            slot_starts=requests[:-1] * length,
            slot_counts=of_all(self.length + (rows - 1)),
            row_starts=requests * rows,
            trunk=of_all(trunk),
            branch=of_all(branch),
            max_slots=length,
            max_rows=rows,
        )
        pool, targets = group.decoder.pool, slots.reshape(-1).long()
        targets = torch.where(targets == pool.blank, pool.spare, targets)
        plan = AttentionPlan(pool, targets, layout, fixed=True)
        if group.decoder.context is not None:
            places = places.clamp(max=group.decoder.context - 1)
        ids, positions = of_all(tokens, torch.int64), of_all(places, torch.int64)
        if rows == 1:
            return group.decoder.logits_of(ids, positions, plan)
        return group.decoder.states_of(ids, positions, plan, group.segments)

    def _grouped(self, length: int) -> list[Group]:
        """All that goes through models in a step: the policy, then guides by their decoders."""

        def adapter_of(name: str | None) -> int:
            adapter = None if name is None else self.scorers[name].adapter
            return -1 if adapter is None else adapter

        of_policy: list[str | None] = [None]
        # Heads on the policy's states need no rows of their own where it reads the candidates.
        of_policy += [name for name in self.leapers if adapter_of(name) >= 0]
        decoders: dict[int, tuple[Decoder, list[str | None]]] = {}
        for name, scorer in self.scorers.items():
            if name not in self.leapers:
                decoders.setdefault(id(scorer.decoder), (scorer.decoder, []))[1].append(name)
        parts = [(self.policy, of_policy), *decoders.values()]
        groups = []
        for decoder, guides in parts:
            guides.sort(key=adapter_of)
            rows = 1 if guides == [None] and not self.leapers else 1 + self.width
            numbers = np.repeat([adapter_of(name) for name in guides], self.lanes * rows)
            shape = len(guides), self.lanes, length
            tables = torch.full(shape, decoder.pool.blank, dtype=torch.int32, device=decoder.device)
            segments = None
            if max(numbers) >= 0:
                edges = np.searchsorted(numbers, np.arange(len(decoder.adapters) + 1))
                segments = torch.from_numpy(edges.astype(np.int32)).to(decoder.device)
            groups.append(Group(decoder, guides, rows, tables, segments))
        return groups
