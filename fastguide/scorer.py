"""Score candidate continuations of many prefixes in one forward pass over a shared prefix cache.

Usable on its own: a serving stack keeps one state per request, hands over candidate tokens and
gets a scalar for each.

    scorer = TreeScorer(decoder, head)
    state = scorer.open(prompt_ids)
    (scores,) = scorer.score([state], [[5, 9, 11]])     # three candidates, one pass
    state.append(9)                                     # its keys and values are kept
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any, Protocol, SupportsIndex

import torch
from torch import Tensor

from fastguide.cache import CachedSequence
from fastguide.models.decoder import Decoder

Candidate = SupportsIndex | Sequence[SupportsIndex]
"""A continuation: one token id, or a branch of several."""


class State(Protocol):
    """What a scorer remembers of one request."""

    tokens: list[int]
    """The request's tokens so far, prompt included."""

    def append(self, *tokens: int) -> None:
        """Continue the request; what was just scored need not be computed again."""

    def fork(self) -> State:
        """A second request with the same tokens, sharing what was computed."""

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on."""

    def close(self) -> None:
        """Give back everything the request holds."""


class Scorer(Protocol):
    """A loaded guide: gives each candidate continuation of each request a scalar."""

    @property
    def context(self) -> int | None:
        """Most tokens of a request, candidate included; None for no limit."""

    def open(self, tokens: Sequence[int]) -> State:
        """Start a request with its prompt's tokens."""

    # States come back to the scorer that opened them, so each takes its own kind (hence Any).
    def prefill(self, states: Sequence[Any]) -> None:
        """Compute what can be computed before candidates are known."""

    def score(
        self, states: Sequence[Any], candidates: Sequence[Sequence[Candidate]]
    ) -> list[Tensor]:
        """Scores of every request's candidates: ``[k_r]`` fp32 tensors; higher is better.

        Any device will do; a score that is NaN or infinite, or an exception, fails its request.
        """


class TreeScorer:
    """A decoder with a scalar head; all requests' candidates go through it as one tree pass."""

    def __init__(
        self,
        decoder: Decoder,
        head: Callable[[Tensor], Tensor],
        kind: str | None = None,
        adapter: int | None = None,
    ) -> None:
        """Put a head on a decoder.

        Args:
            decoder: a model that gives hidden states ``[n, hidden]``; it may be the policy itself.
            head: hidden states ``[n, hidden]`` to scalars ``[n]`` or ``[n, 1]``.
            kind: what the scalars are, as in ``GuideConfig``; None fits every rule.
            adapter: of the decoder's adapters, the one that its states go through.
        """
        self.kind = kind
        self.adapter = adapter
        self.decoder = decoder
        self.head = head
        self.context = decoder.context
        self.vocabulary = decoder.vocabulary

    def open(self, tokens: Sequence[int]) -> CachedSequence:
        """Start a request with its prompt's tokens; nothing is computed yet."""
        return self.decoder.open(tokens, adapter=self.adapter)

    def prefill(self, states: Sequence[CachedSequence], ends: Sequence[int] | None = None) -> None:
        """Compute keys and values of pending tokens: all, or up to ``ends[i]`` in state i."""
        self.decoder.prefill(states, ends=ends)

    @torch.inference_mode()
    def score(
        self, states: Sequence[CachedSequence], candidates: Sequence[Sequence[Candidate]]
    ) -> list[Tensor]:
        """Score candidates in one forward pass: pending tokens, then all candidates as a tree.

        A candidate's score is the head's output at its own last row, whatever token it is: no
        pooling by padding token is involved.

        Args:
            states: R open requests.
            candidates: per request, at least one continuation: a token id or a sequence of ids.
                Requests may have different numbers of them.

        Returns:
            Per request ``[k_r]`` fp32 on the model's device, in the order of the candidates.

        Raises:
            ValueError: if a request has no candidates, names a token that the model does not
                know, or would outgrow the model's context.
        """
        branches = [[branch_of(c) for c in row] for row in candidates]
        if len(branches) != len(states):
            raise ValueError(f"received candidates for {len(branches)} of {len(states)} requests")
        for state, row in zip(states, branches, strict=True):
            if not row or not all(row):
                raise ValueError("received an empty candidate; allowed is one token id or more")
            unknown = [t for branch in row for t in branch if not 0 <= t < self.vocabulary]
            if unknown:
                raise ValueError(
                    f"received token id {unknown[0]}; allowed are 0 to {self.vocabulary - 1}"
                )
            longest = len(state) + max(map(len, row))
            if self.context is not None and longest > self.context:
                raise ValueError(
                    f"a continuation has {longest} tokens; the scorer's context is {self.context}"
                )
        if not states:
            return []
        hidden = self.decoder.run(states, branches, hidden=True)
        return list(self.values(hidden).split([len(row) for row in branches]))

    def values(self, hidden: Tensor) -> Tensor:
        """The head's scalars ``[n]`` fp32 of hidden states ``[n, hidden]``."""
        return self.head(hidden).reshape(-1).float()


def branch_of(candidate: Candidate) -> tuple[int, ...]:
    """The tokens of a candidate."""
    try:  # an int, a numpy integer or a tensor of one; arrays have __index__ too, and refuse it
        return (index(candidate),)  # type: ignore[arg-type]
    except TypeError:
        return tuple(map(index, candidate))  # type: ignore[arg-type]


def follow(scorer: Scorer, states: list[State], rows: Sequence[list[int]]) -> list[State]:
    """Make states hold exactly the given token rows, reusing what they share with them.

    For hosts that show only token ids at each step (``model.generate``, a server without hooks):
    a row continues the state of its own index if that is a prefix of it; else the state with the
    longest common prefix is forked (beam search), else a new one is opened.

    Args:
        scorer: opens new states.
        states: the states of the last call; those that no row needs are closed.
        rows: token ids of each request now.

    Returns:
        One state per row.
    """
    own = [
        i < len(states) and states[i].tokens == row[: len(states[i].tokens)]
        for i, row in enumerate(rows)
    ]
    result: list[State] = []
    for i, row in enumerate(rows):
        if own[i]:
            result.append(states[i])
            continue
        length, best = max(
            ((_common(s.tokens, row), j) for j, s in enumerate(states)), default=(0, 0)
        )
        state = states[best].fork() if length else scorer.open([])
        state.truncate(length)
        result.append(state)
    for i, state in enumerate(states):
        if not (i < len(rows) and own[i]):
            state.close()
    for state, row in zip(result, rows, strict=True):
        if rest := row[len(state.tokens) :]:
            state.append(*rest)
    return result


def _common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
