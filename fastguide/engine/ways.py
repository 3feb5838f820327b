"""When the policy reads the candidates itself: in one pass with its guides, or while they do.

*Two-phase*: the policy reads the last token, then each guide reads the candidates. A row *leaps* if
the policy reads all candidates instead: its next logits are those of the candidate that is drawn.
That pays in three cases. *One-pass*: guides that are LoRAs on the policy's weights read them in the
same pass. *Trunk*: a guide that is a head on the policy's own states needs no rows of its own, so
its rows always leap. *Overlap*: guides on other devices read them at the same time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from fastguide.engine.rows import Row
from fastguide.models.decoder import Decoder
from fastguide.scorer import Scorer, TreeScorer

WAYS = ("auto", "one-pass", "overlap", "two-phase")
"""What ``way`` may be; ``auto`` takes what costs less, by measured passes."""


class Ways:
    """Which rows of a step have their candidates read by the policy, too."""

    def __init__(self, policy: Decoder, scorers: Mapping[str, Scorer], way: str = "auto") -> None:
        """Look which guides are on the policy's weights, and which on other devices.

        Args:
            policy: of the engine.
            scorers: of the engine, by name.
            way: one of ``WAYS``.

        Raises:
            ValueError: for another way, or one that the policy cannot go.
        """
        if way not in WAYS:
            raise ValueError(f"way is {way!r}; allowed are {', '.join(WAYS)}")
        trees = {name: s for name, s in scorers.items() if isinstance(s, TreeScorer)}
        self.inside = frozenset(name for name, s in trees.items() if s.decoder is policy)
        """Guides on the policy's weights."""
        self.trunk = frozenset(name for name in self.inside if trees[name].adapter is None)
        """Of these, heads on the policy's own states."""
        self.beside = {
            name: s.decoder
            for name, s in trees.items()
            if name not in self.inside
            and (way == "overlap" or (way == "auto" and s.decoder.device != policy.device))
        }
        """The models of guides that read candidates while the policy does."""
        leapers = self.inside.union(self.beside)
        if leapers and way != "two-phase" and not policy.splits:
            if way != "auto":
                raise ValueError(
                    f"way is {way!r}, but the policy does more to its logits than its head; "
                    "allowed are auto, two-phase"
                )
            way = "two-phase"
        self.way = way
        self.leapers = frozenset() if way == "two-phase" else leapers
        """Guides whose rows may leap."""
        self._policy = policy
        self._costs: dict[int, PassCost] = {}
        self.taken: Counter[str] = Counter()
        """Steps by the way that they went."""

    def stateless(self, name: str) -> bool:
        """Whether a guide is a head on the policy's own states, and so has none."""
        return name in self.trunk and self.way != "two-phase"

    def choose(self, rows: Sequence[Row], counts: Sequence[int]) -> tuple[str, list[int]]:
        """The way that a step goes, by its name in ``taken``, and the rows that leap, by index.

        Args:
            rows: of the step.
            counts: of their candidates.
        """
        users = [i for i, row in enumerate(rows) if not self.leapers.isdisjoint(row.weights)]
        if not users:
            return "two-phase" if any(row.weights for row in rows) else "unguided", []
        trunk = [i for i in users if not self.trunk.isdisjoint(rows[i].weights)]
        if len(trunk) == len(users):
            return "trunk", trunk
        if self.way != "auto" or self._pays(rows, users, counts):
            adapters = self.inside - self.trunk
            shared = any(not adapters.isdisjoint(rows[i].weights) for i in users)
            return "one-pass" if shared else "overlap", users
        return "two-phase", trunk

    def measure(self, agree: Callable[[float], float] = float) -> None:
        """Time the passes of the models, where there will be a choice by their cost.

        Args:
            agree: makes of seconds measured here those that all processes of an engine go by.
        """
        if self.way == "auto" and self.leapers > self.trunk:
            for decoder in (self._policy, *self.beside.values()):
                if id(decoder) not in self._costs:
                    self._costs[id(decoder)] = PassCost(decoder, agree)

    def _pays(self, rows: Sequence[Row], users: Sequence[int], counts: Sequence[int]) -> bool:
        """Whether a step costs less if all users leap than if none does."""
        assert self._costs, "ways are measured before they are chosen"
        policy = self._costs[id(self._policy)]
        adapters = self.inside - self.trunk
        of_policy = sum(counts[i] for i in users)
        of_adapters = sum(counts[i] * len(adapters & rows[i].weights.keys()) for i in users)
        elsewhere: Counter[torch.device] = Counter()
        for name, decoder in self.beside.items():
            of_guide = sum(counts[i] for i in users if name in rows[i].weights)
            elsewhere[decoder.device] += self._costs[id(decoder)](of_guide)  # type: ignore[assignment]
        beside = max(elsewhere.values(), default=0)
        # Rows that do not leap need the policy's pass in any case.
        together = max(policy(of_policy + of_adapters), beside) + policy(len(rows) - len(users))
        return together < policy(len(rows)) + policy(of_adapters) + beside


class PassCost:
    """Seconds of a pass by its number of rows, measured once, on a prefix of a few tokens."""

    ROWS = (1, 4, 16, 64, 256)
    MOST = 0.2
    """Seconds: beyond a pass that takes longer, the line is drawn on."""

    def __init__(self, decoder: Decoder, agree: Callable[[float], float] = float) -> None:
        probe = decoder.twin()
        sequence = probe.open([0] * 8)
        probe.prefill([sequence])
        self._rows: list[int] = []
        self._seconds: list[float] = []
        for count in self.ROWS:
            branches = [[(0,)] * count]
            times = []
            for _ in range(3):
                start = time.perf_counter()
                probe.run([sequence], branches, hidden=True)
                probe.synchronize()
                times.append(time.perf_counter() - start)
            self._rows.append(count)
            self._seconds.append(max([agree(min(times)), *self._seconds[-1:]]))
            if self._seconds[-1] > self.MOST:
                break

    def __call__(self, rows: int) -> float:
        """Seconds of a pass of ``rows`` rows; 0 for none."""
        if rows < 1:
            return 0.0
        last = self._rows[-1]
        if rows <= last or len(self._rows) == 1:
            return float(np.interp(rows, self._rows, self._seconds))
        slope = (self._seconds[-1] - self._seconds[-2]) / (last - self._rows[-2])
        return self._seconds[-1] + slope * (rows - last)
