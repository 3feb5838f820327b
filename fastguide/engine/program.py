"""A step of fixed shapes that needs no host: what a CUDA graph can hold.

``ModelRunner`` lays each pass out on the host, and a device that is done with the last one waits
for it. Here the layout follows by arithmetic on the device from two numbers of each *lane*, its
length and its last token, so a step is the same list of kernels whoever runs in it: captured once
for a number of lanes and of candidates, and replayed.

Each lane has a *table* for the policy and one for each guide: the slots of its tokens, and behind
them those of tokens to come. The policy reads the last token; a guide reads it, too, and the
candidates in slots of tokens to come. Whichever is drawn is read again as the next step's last
token, one row more for each guide, so that nothing moves and no draw is waited for.

Where rows *leap* (``ways``), the policy reads the candidates in one pass with the guides on its
weights, and the state of the one drawn gives the next logits: the lane is *open*. A lane that drew
another token, or is new, has the policy read its last token first, as all have in other programs.

The host sees to the tokens of a step while the device makes the next: that one is launched before
they are read, or, where rows leap, as soon as they are, for it depends on which lanes are open.
What a row draws depends on its seed and position alone, so a step that nobody needs can be dropped.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastguide.cache import CachedSequence, OutOfSlots
from fastguide.config import Plain
from fastguide.engine.rows import Row
from fastguide.engine.sampler import Candidates, RowBatch, Step, draw, top_candidates
from fastguide.kernels import TreeLayout
from fastguide.models.attention import AttentionPlan
from fastguide.models.decoder import Decoder
from fastguide.models.loading import one_line
from fastguide.scorer import Scorer, TreeScorer

FAILED = "a step of fixed shapes failed, and is laid out on the host"
BLOCK = 16
"""Slots of tokens to come that a lane gets at once, beside those of its candidates."""


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


class Flight(NamedTuple):
    """A step on its way."""

    lanes: dict[Row, int]
    """Of the rows that take part."""
    numbers: Tensor
    """``[8, B]`` fp64 on the host, as soon as it is there."""
    there: torch.cuda.Event | None

    def read(self) -> list[list[float]]:
        """What the step gave; waits for it."""
        if self.there is not None:
            self.there.synchronize()
        found: list[list[float]] = self.numbers.tolist()
        return found


class StepProgram:
    """Steps of up to ``lanes`` rows with up to ``width`` candidates."""

    def __init__(
        self,
        policy: Decoder,
        scorers: Mapping[str, TreeScorer],
        lanes: int,
        width: int,
        length: int,
        leapers: Collection[str] = (),
    ) -> None:
        """Allocate all that a step reads and writes.

        Args:
            policy: its pool is fixed, and so are those of the guides; see ``KVPool.fix``.
            scorers: guides on the policy's device.
            lanes: B.
            width: K, most candidates that guides read.
            length: L, most tokens of a lane, candidates included.
            leapers: guides on the policy's weights whose rows leap; none in two-phase steps.
        """
        self.policy, self.scorers = policy, dict(scorers)
        self.lanes, self.width = lanes, min(width, policy.vocabulary)
        self.leapers = frozenset(leapers)
        # Rows without guides want more candidates than guides read, to draw from.
        self._columns = max(self.width, Plain().lower(1.0).k) + 1
        self.rows: list[Row | None] = [None] * lanes
        device = policy.device
        self._length = torch.ones(lanes, dtype=torch.int64, device=device)
        self._token = torch.zeros(lanes, dtype=torch.int64, device=device)
        self._taken = torch.zeros(lanes, dtype=torch.bool, device=device)
        """Whether a lane has a row; others stay as they are."""
        self._reads = torch.zeros(lanes, dtype=torch.int64, device=device)
        """How many of its candidates the policy reads."""
        self._open = torch.zeros(lanes, dtype=torch.bool, device=device)
        self._known = [False] * lanes
        """The same after the last step that the host has read."""
        self._logits: Tensor | None = None
        """``[B, V]``, of open lanes."""
        self._groups = self._grouped(length)
        own = self._groups[0]
        self._first = own._replace(guides=[None], rows=1, tables=own.tables[:1], segments=None)
        """The policy's last tokens."""
        self._batch = self._row_batch()
        self._out = torch.zeros(8, lanes, dtype=torch.float64, device=device)
        self.candidates: Candidates | None = None
        """Of the last step."""
        self.scores: Tensor | None = None
        """``[G, B, columns]`` of the last step."""
        self._flight: Flight | None = None
        self._graphs: dict[bool, Captured] = {}
        self._capturable = True

    # ----------------------------------------------------------------------------- the host's part

    def step(self, rows: Sequence[Row]) -> tuple[Step, list[int | None]]:
        """Advance rows by one token; those without a token (-1) stay as they are.

        Returns:
            the step, and each row's lane; None for a row that came when the step was on its way,
            and takes part in the next.

        Raises:
            OutOfSlots: a pool is too short for the tokens to come.
        """
        flight, self._flight = self._flight, None
        if flight is None or flight.lanes.keys().isdisjoint(rows):
            self._seat(rows)
            flight = self._launch()
        # A step with leaps depends on which lanes are open; others need nothing from the host.
        ahead = False
        if not self.leapers:
            ahead = self._launch_ahead(rows, flight.lanes)
        numbers = flight.read()
        self._known = [bool(known) for known in numbers[-1]]
        lanes = [flight.lanes.get(row) for row in rows]
        nothing = [-1.0] * len(numbers)
        each = [nothing if n is None else [column[n] for column in numbers] for n in lanes]
        tokens, sources, scores, logprobs, base, kl, counts, _ = map(list, zip(*each, strict=True))
        for row, token in zip(rows, tokens, strict=True):
            if token >= 0:
                for sequence in self._sequences(row):
                    sequence.advance(int(token))
                row.steps += 1
        if self.leapers:
            ahead = self._launch_ahead(rows)
        if not ahead:
            self.leave()
        pairs = zip(counts, rows, strict=True)
        scored = [0 if not row.weights or row.settled(int(n)) else int(n) for n, row in pairs]
        whole = [int(t) for t in tokens], [int(s) for s in sources]
        return Step(*whole, scores, logprobs, base, kl, scored), lanes

    def _launch_ahead(self, rows: Sequence[Row], unread: Collection[Row] = ()) -> bool:
        """Have the device begin the next step; False if it cannot, and its state is uncertain.

        Args:
            rows: of the step.
            unread: those that a step is on its way for already.
        """
        try:
            self._seat(rows, unread)
            self._flight = self._launch()
        except OutOfSlots:  # the next step raises it, if there is no room then, either
            return False
        except Exception as error:
            warnings.warn(f"{FAILED}: {one_line(error)}", stacklevel=2)
            return False
        return True

    def leave(self) -> None:
        """Forget all rows: they have gone, or go on elsewhere."""
        self._flight = None
        for row in self.rows:
            for sequence in [] if row is None else self._sequences(row):
                sequence.drop_ahead()
        self.rows = [None] * self.lanes
        self._clear(list(range(self.lanes)))

    def _sequences(self, row: Row) -> list[CachedSequence]:
        states = [state for state in row.states.values() if isinstance(state, CachedSequence)]
        return [row.sequence, *states]

    def _seat(self, rows: Sequence[Row], unread: Collection[Row] = ()) -> None:
        """Give every row a lane, and every lane the slots of its next token and candidates.

        Args:
            rows: of the step.
            unread: rows that have a token more on the device than on the host.
        """
        wanted = {id(row): row for row in rows}
        before = list(self.rows)
        self.rows = [wanted.pop(id(row), None) if row is not None else None for row in before]
        free = iter([lane for lane, row in enumerate(self.rows) if row is None])
        for newcomer in wanted.values():
            self.rows[next(free)] = newcomer
        changed = [lane for lane, row in enumerate(self.rows) if row is not before[lane]]
        if changed:
            new = {lane: row for lane in changed if (row := self.rows[lane]) is not None}
            self._enter(list(new.values()))
            self._clear(changed)
            self._batch = self._row_batch(self._batch)
            at = torch.tensor(list(new), device=self._length.device, dtype=torch.int64)
            lengths = torch.tensor([len(row.sequence) for row in new.values()], dtype=torch.int64)
            last = torch.tensor([row.sequence.tokens[-1] for row in new.values()])
            reads = [self._read_by_policy(row) for row in new.values()]
            self._taken[at] = True
            self._length[at] = lengths.to(at.device)
            self._token[at] = last.to(at.device, torch.int64)
            self._reads[at] = torch.tensor(reads, dtype=torch.int64).to(at.device)
        for group in self._groups:
            self._supply(group, set(changed), unread)

    def _enter(self, rows: Sequence[Row]) -> None:
        """Have all models wait for the last token of rows, which none has read."""
        for row in rows:
            for sequence in self._sequences(row):
                sequence.drop_branches()
                if not sequence.pending:
                    last = sequence.tokens[-1]
                    sequence.truncate(len(sequence) - 1)
                    sequence.append(last)
        for name, scorer in self.scorers.items():
            states = [s for row in rows if (s := self._state(row, name)) is not None]
            scorer.decoder.prefill([s for s in states if len(s.pending) > 1], keep=1)

    def _clear(self, lanes: list[int]) -> None:
        """Have lanes read and write slots that are nobody's: others may get theirs."""
        at = torch.tensor(lanes, device=self._length.device)
        for group in self._groups:
            group.tables[:, at] = group.decoder.pool.blank
        self._length[at], self._token[at] = 1, 0
        self._reads[at], self._open[at], self._taken[at] = 0, False, False
        for lane in lanes:
            self._known[lane] = False

    def _read_by_policy(self, row: Row) -> int:
        """How many candidates of a row the policy reads."""
        return 0 if self.leapers.isdisjoint(row.weights) else row.parameters.k

    def _supply(self, group: Group, changed: set[int], unread: Collection[Row]) -> None:
        """Write the slots of tokens to come into a group's tables; all slots of new lanes."""
        _, lanes, length = group.tables.shape
        places: list[np.ndarray] = []
        slots: list[np.ndarray] = []
        most = sum(len(g.guides) * (g.rows + BLOCK) for g in self._groups)
        block = BLOCK if group.decoder.pool.available() >= lanes * most else 0
        for t, name in enumerate(group.guides):
            for lane, row in enumerate(self.rows):
                sequence = None if row is None else self._state(row, name)
                if row is None or sequence is None:
                    continue
                # Candidates past the row's own are nobody's.
                k = self._read_by_policy(row) if name is None else row.parameters.k
                needed = 1 + k + (row in unread)
                begin, known = (t * lanes + lane) * length, len(sequence) - 1
                had = len(sequence.ahead)
                if had < needed:
                    room = length - known - needed
                    sequence.reserve(needed - had + max(0, min(block, room)))
                elif lane not in changed:
                    continue
                if lane in changed:
                    places.append(np.arange(begin, begin + known))
                    slots.append(sequence.slots)
                    had = 0
                end = begin + known + len(sequence.ahead)
                places.append(np.arange(begin + known + had, end))
                slots.append(sequence.ahead[had:])
        if places:
            both = torch.from_numpy(np.stack([np.concatenate(places), np.concatenate(slots)]))
            if group.tables.is_cuda:  # the device may be busy with a step: do not wait for it
                both = both.pin_memory().to(group.tables.device, non_blocking=True)
            group.tables.view(-1)[both[0]] = both[1].int()

    @staticmethod
    def _state(row: Row, name: str | None) -> CachedSequence | None:
        state = row.sequence if name is None else row.states.get(name)
        return state if isinstance(state, CachedSequence) else None

    def _row_batch(self, held: RowBatch | None = None) -> RowBatch:
        """The parameters of all lanes; written over those that are held, which graphs read."""
        nobody = Plain().lower(1.0)._replace(k=1)
        built = RowBatch.build(
            [nobody if row is None else row.parameters for row in self.rows],
            [0 if row is None else row.seed for row in self.rows],
            [{} if row is None else row.weights for row in self.rows],
            list(self.scorers),
            self.policy.device,
        )
        mass = built.mass
        if mass is None:
            mass = torch.ones(self.lanes, dtype=torch.float64, device=self.policy.device)
        built = dataclasses.replace(built, mass=mass, width=self._columns)
        if held is None:
            return built
        for name in ("count", "mode", "scale", "weight", "inv_temperature", "seed", "mass"):
            getattr(held, name).copy_(getattr(built, name))
        held.guide_weights.copy_(built.guide_weights)
        return held

    # --------------------------------------------------------------------------- the device's part

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

    def _launch(self) -> Flight:
        """Have the device begin a step."""
        if self.policy.device.type == "cuda":  # graphs and events are the current device's
            with torch.cuda.device(self.policy.device):
                return self._launch_here()
        return self._launch_here()

    def _launch_here(self) -> Flight:
        """A step: on a GPU the graph of it, which the first one captures."""
        first = any(row and not known for row, known in zip(self.rows, self._known, strict=True))
        captured = self._graphs.get(first)
        if captured is None and self.policy.device.type == "cuda" and self._capturable:
            try:
                captured = self._graphs[first] = self._capture(first)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # something in a model waits for the device
                self._capturable = False
                warnings.warn(
                    f"steps are not replayed as CUDA graphs: {one_line(error)}", stacklevel=2
                )
        if captured is not None:
            captured.graph.replay()
            self.candidates, self.scores = captured.candidates, captured.scores
        else:
            self.candidates, self.scores = self._compute(first)
        lanes = {row: lane for lane, row in enumerate(self.rows) if row is not None}
        if not self._out.is_cuda:
            return Flight(lanes, self._out.clone(), None)
        numbers = torch.empty(self._out.shape, dtype=self._out.dtype, pin_memory=True)
        numbers.copy_(self._out, non_blocking=True)
        there = torch.cuda.Event()
        there.record()
        return Flight(lanes, numbers, there)

    def _capture(self, first: bool) -> Captured:
        """The step as a graph; the lanes are left as they were."""
        device, state = self.policy.device, [self._length, self._token, self._open]
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
        candidates = top_candidates(logits, self._batch)
        batch = self._batch.narrowed(candidates)
        last, ids = self._token[:, None], candidates.ids[:, : self.width].long()
        asked = torch.arange(ids.shape[1], device=ids.device) < batch.count[:, None]
        # In place of others the last token: a row must not see NaN that it did not ask for.
        ids = torch.where(asked & (ids >= 0), ids, last)
        tokens = torch.cat([last, ids], 1)
        states: dict[str | None, Tensor] = {}
        for group in self._groups:
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
        drawn = draw(logits, candidates, scores, batch, self._length)
        moves = (drawn.token >= 0) & self._taken
        if self.leapers:
            self._open.copy_((drawn.source >= 0) & (drawn.source < self._reads))
            place = (drawn.source.long() + 1).clamp(0, ids.shape[1])
            at = place[:, None, None].expand(-1, 1, states[None].shape[-1])
            assert self._logits is not None
            self._logits.copy_(self.policy.logits(states[None].gather(1, at)[:, 0]))
        columns = [column.double() for column in (*drawn, batch.count, self._open)]
        self._out.copy_(torch.stack(columns))
        self._token.copy_(torch.where(moves, drawn.token, self._token))
        self._length.add_(moves.long())
        return candidates, scores

    def _policy_logits(self, first: bool) -> Tensor:
        """``[B, V]``: of last tokens read now, unless the lane is open."""
        if not first:
            assert self._logits is not None
            return self._logits
        fresh = self._pass(self._first, self._token[:, None])
        if not self.leapers:
            return fresh
        if self._logits is None:
            self._logits = fresh.clone()
        return torch.where(self._open[:, None], self._logits, fresh)

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
        last = self._length[:, None] - 1
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
            slot_counts=of_all(self._length + (rows - 1)),
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


LANES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WIDTHS = (1, 10, 20, 50, 100, 200)
"""Numbers of lanes and candidates that there are programs for; others take the next larger."""

MOST = 64
"""Programs that are kept; the one that was used longest ago goes first."""


class Programs:
    """The programs of a policy and the guides in use, made as they are needed."""

    def __init__(self, policy: Decoder, scorers: Mapping[str, TreeScorer]) -> None:
        self._policy, self._scorers = policy, dict(scorers)
        self._made: dict[tuple[int, int, frozenset[str], tuple[str, ...]], StepProgram] = {}
        self._active: StepProgram | None = None

    @staticmethod
    def possible(policy: Decoder, scorers: Mapping[str, Scorer]) -> bool:
        """Whether steps with these guides can have fixed shapes."""
        return all(
            isinstance(scorer, TreeScorer) and scorer.decoder.device == policy.device
            for scorer in scorers.values()
        )

    def leave(self) -> None:
        """Forget all rows: what comes next happens elsewhere."""
        if self._active is not None:
            self._active.leave()
            self._active = None

    def of(self, rows: Sequence[Row], leapers: frozenset[str]) -> StepProgram | None:
        """The program that rows are stepped by; None if there is none so large.

        Args:
            rows: of the step.
            leapers: guides whose rows leap.
        """
        k = max((row.parameters.k for row in rows if row.weights), default=1)
        lanes = next((n for n in LANES if n >= len(rows)), None)
        width = next((n for n in WIDTHS if n >= k), None)
        if lanes is None or width is None:
            return None
        used = set().union(*(row.weights for row in rows))
        scorers = {name: s for name, s in self._scorers.items() if name in used}
        leapers = leapers.intersection(scorers)
        key = lanes, width, leapers, tuple(scorers)
        program = self._made.pop(key, None)
        if program is None:
            while len(self._made) >= MOST:
                del self._made[next(iter(self._made))]
            capacity = self._policy.pool.slots.capacity
            length = min(self._policy.context or capacity, capacity) + width + 3
            program = StepProgram(self._policy, scorers, lanes, width, length, leapers)
        self._made[key] = program  # the last one used comes last
        if program is not self._active:
            self.leave()
            self._active = program
        return program
