"""How guides on the policy's own weights run: in one pass with the policy, or after it.

*Two-phase*: the policy reads the last token, then each guide reads the candidates. *One-pass*: the
policy reads all candidates, together with the guides that are LoRAs on its weights; the next logits
are those of the candidate that was drawn. *Trunk*: a guide that is a head on the own states of the
policy needs no rows of its own, so it always runs in one pass.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fastguide.engine.rows import Row
from fastguide.models.decoder import Decoder
from fastguide.scorer import Scorer, TreeScorer

WAYS = ("auto", "one-pass", "two-phase")
"""What ``way`` may be; ``auto`` takes what costs less, by measured passes."""


class Ways:
    """Which rows of a step have their candidates read by the policy and its guides in one pass."""

    def __init__(self, policy: Decoder, scorers: Mapping[str, Scorer], way: str = "auto") -> None:
        """Look which guides are on the policy's weights.

        Args:
            policy: of the engine.
            scorers: of the engine, by name.
            way: one of ``WAYS``.

        Raises:
            ValueError: for another way, or one that the policy cannot go.
        """
        if way not in WAYS:
            raise ValueError(f"way is {way!r}; allowed are {', '.join(WAYS)}")
        on_policy = {
            name: scorer.adapter
            for name, scorer in scorers.items()
            if isinstance(scorer, TreeScorer) and scorer.decoder is policy
        }
        self.inside: frozenset[str] = frozenset(on_policy)
        """Guides on the policy's weights."""
        if on_policy and way != "two-phase" and not policy.splits:
            if way == "one-pass":
                raise ValueError(
                    "way is 'one-pass', but the policy does more to its logits than its head; "
                    "allowed are auto, two-phase"
                )
            way = "two-phase"
        self.way = way
        self._trunk = frozenset(n for n, adapter in on_policy.items() if adapter is None)
        self._policy = policy
        self._cost: PassCost | None = None
        self.taken: Counter[str] = Counter()
        """Steps by the way that they went."""

    def stateless(self, name: str) -> bool:
        """Whether a guide is a head on the policy's own states, and so has none."""
        return name in self._trunk and self.way != "two-phase"

    @property
    def reads_candidates(self) -> bool:
        """Whether the policy itself may read candidates."""
        return bool(self.inside) and self.way != "two-phase"

    def leaping(self, rows: Sequence[Row], counts: Sequence[int]) -> list[int]:
        """The rows that go in one pass, by index; counts the step.

        Args:
            rows: of the step.
            counts: of their candidates.
        """
        guided = any(row.weights for row in rows)
        users = [i for i, row in enumerate(rows) if not self.inside.isdisjoint(row.weights)]
        if self.way == "two-phase" or not users:
            self.taken["two-phase" if guided else "unguided"] += 1
            return []
        trunk = [i for i in users if not self._trunk.isdisjoint(rows[i].weights)]
        if len(trunk) == len(users):
            self.taken["trunk"] += 1
            return trunk
        if self.way == "one-pass" or self._pays(rows, users, counts):
            self.taken["one-pass"] += 1
            return users
        self.taken["two-phase"] += 1
        return trunk

    def measure(self, agree: Callable[[float], float] = float) -> None:
        """Time the policy's passes, where there will be a choice by their cost.

        Args:
            agree: makes of seconds measured here those that all processes of an engine go by.
        """
        if self.way == "auto" and self.inside > self._trunk:
            self._cost = PassCost(self._policy, agree)

    def _pays(self, rows: Sequence[Row], users: Sequence[int], counts: Sequence[int]) -> bool:
        """Whether one pass over all rows costs less than the policy's and then the guides'."""
        assert self._cost is not None, "ways are measured before they are chosen"
        of_guides = sum(counts[i] * len(self.inside & rows[i].weights.keys()) for i in users)
        of_policy = sum(counts[i] for i in users)
        others = len(rows) - len(users)
        after = self._cost(len(rows)) + self._cost(of_guides)
        # Rows that do not leap need the policy's pass in any case.
        beside = self._cost(others) if others else 0.0
        return self._cost(of_policy + of_guides) + beside < after


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
