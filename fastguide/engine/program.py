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
from fastguide.engine.fixed import FixedStep, Group
from fastguide.engine.rows import Row
from fastguide.engine.sampler import RowBatch, Step
from fastguide.models.decoder import Decoder
from fastguide.models.loading import one_line
from fastguide.scorer import Scorer, TreeScorer

FAILED = "a step of fixed shapes failed, and is laid out on the host"
BLOCK = 16
"""Slots of tokens to come that a lane gets at once, beside those of its candidates."""


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
        self.scorers = dict(scorers)
        self.lanes = lanes
        self.leapers = frozenset(leapers)
        self.rows: list[Row | None] = [None] * lanes
        self._device = policy.device
        width = min(width, policy.vocabulary)
        # Rows without guides want more candidates than guides read, to draw from.
        self._columns = max(width, Plain().lower(1.0).k) + 1
        self.fixed = FixedStep(
            policy, scorers, lanes, width, length, leapers, batch=self._row_batch()
        )
        """The device's part."""
        self._known = [False] * lanes
        """Whether a lane was open after the last step that was read."""
        self._flight: Flight | None = None

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

    def _launch(self) -> Flight:
        """Have the device begin a step with those who are seated."""
        lanes = {row: lane for lane, row in enumerate(self.rows) if row is not None}
        first = not all(self._known[lane] for lane in lanes.values())
        return Flight(lanes, *self.fixed.launch(first))

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
            self.fixed.parametrize(self._row_batch())
            lengths = [len(row.sequence) for row in new.values()]
            last = [row.sequence.tokens[-1] for row in new.values()]
            reads = [self._read_by_policy(row) for row in new.values()]
            self.fixed.enter(list(new), lengths, last, reads)
        for group in self.fixed.groups:
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
        """Nobody is in these lanes now."""
        self.fixed.clear(lanes)
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
        most = sum(len(g.guides) * (g.rows + BLOCK) for g in self.fixed.groups)
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

    def _row_batch(self) -> RowBatch:
        """The parameters of all lanes."""
        nobody = Plain().lower(1.0)._replace(k=1)
        built = RowBatch.build(
            [nobody if row is None else row.parameters for row in self.rows],
            [0 if row is None else row.seed for row in self.rows],
            [{} if row is None else row.weights for row in self.rows],
            list(self.scorers),
            self._device,
        )
        mass = built.mass
        if mass is None:
            mass = torch.ones(self.lanes, dtype=torch.float64, device=self._device)
        return dataclasses.replace(built, mass=mass, width=self._columns)


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
