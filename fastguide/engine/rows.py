"""One running sample as the models see it: its sequence, its states in the guides, its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastguide.cache import CachedSequence
from fastguide.config import FILLS, RowParameters
from fastguide.scorer import State


@dataclass(eq=False)
class Row:
    """One running sample: its policy sequence, its state in every guide it uses, its numbers."""

    sequence: CachedSequence
    parameters: RowParameters
    weights: Mapping[str, float]
    """Guides in use by name; empty for plain decoding."""
    seed: int
    states: dict[str, State] = field(default_factory=dict)
    steps: int = 0
    error: str | None = None
    ready: bool = False
    """Whether its tokens are computed in every model, all but the one that gives logits."""

    @property
    def length(self) -> int:
        """Tokens to compute before the first step, which runs the policy's last one itself."""
        return len(self.sequence) - (not self._trees)

    @property
    def computed(self) -> int:
        """How many of these are computed in every model."""
        done, last = len(self.sequence.slots), len(self.sequence) - 1
        cached = [done if done < last else self.length]
        return min(cached + [len(state.slots) for state in self._trees])

    @property
    def _trees(self) -> list[CachedSequence]:
        return [state for state in self.states.values() if isinstance(state, CachedSequence)]

    def fork(self, seed: int) -> Row:
        """A row with the same tokens and another seed, sharing every slot."""
        twin = Row(self.sequence.fork(), self.parameters, self.weights, seed, {}, self.steps)
        twin.ready = self.ready
        try:
            twin.states = {name: state.fork() for name, state in self.states.items()}
        except BaseException:
            twin.close()
            raise
        return twin

    def publish(self) -> None:
        """Let other requests that begin with the same tokens share what is computed of them."""
        for held in (self.sequence, *self._trees):
            held.publish()

    def close(self) -> None:
        """Give back every slot in every model."""
        self.sequence.close()
        for state in self.states.values():
            state.close()

    def settled(self, count: int) -> bool:
        """Whether scores cannot matter: ``count`` is one, and its score is no other token's."""
        adaptive = self.parameters.mass < 1
        return count == 1 and adaptive and self.parameters.fill != FILLS.index("none")

    def append(self, token: int) -> None:
        """Continue the row in the policy and in every guide."""
        self.sequence.append(token)
        for state in self.states.values():
            state.append(token)
        self.steps += 1


class RowSpec(NamedTuple):
    """What a row begins with."""

    tokens: Sequence[int]
    parameters: RowParameters
    weights: Mapping[str, float]
    seed: int
    steps: int = 0
    """How many of the tokens are a response's, for messages."""
