"""One decode step for all running rows: policy, candidates, guides, sampling, commit.

Follow a token's logits here: ``policy.run`` gives them, ``top_candidates`` takes their top,
the guides' scorers score it, ``sample`` folds the scores in and draws, ``append`` commits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguide.cache import CachedSequence
from fastguide.config import FILLS, RowParameters
from fastguide.engine.sampler import Candidates, RowBatch, Step, sample, top_candidates
from fastguide.models.decoder import Decoder
from fastguide.models.loading import one_line
from fastguide.scorer import Scorer, State, TreeScorer


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


class ModelRunner:
    """Owns the loaded policy and guides; opens rows, prefills and steps them."""

    def __init__(self, policy: Decoder, scorers: Mapping[str, Scorer]) -> None:
        self.policy = policy
        self.scorers = dict(scorers)
        self.seconds = {"base": 0.0, "scorer": 0.0, "rule": 0.0}
        """Time spent in each phase of all steps so far, for benchmarks."""
        self._batch: tuple[list[Row], RowBatch] | None = None

    def open(self, prompts: Sequence[RowSpec]) -> list[Row]:
        """Start rows, sharing what the pools still have of their tokens; computes nothing.

        ``prefill`` may compute the tokens in pieces; what it leaves goes into the first step,
        which runs the last token in any case and gives the first logits.
        """
        rows: list[Row] = []
        try:
            for tokens, parameters, weights, seed, steps in prompts:
                sequence = self.policy.open(tokens, keep=1)
                rows.append(Row(sequence, parameters, weights, seed, {}, steps))
                for name, scorer in self.scorers.items():
                    if name in weights:
                        rows[-1].states[name] = scorer.open(sequence.tokens)
        except BaseException:
            for row in rows:
                row.close()
            raise
        return rows

    def prefill(self, rows: Sequence[Row], ends: Sequence[int]) -> None:
        """Compute the tokens of each row up to ``ends[i]`` in every model, all rows together.

        Rows that are computed up to their last token become ``ready``; scorers that are no
        ``TreeScorer`` compute a prompt in one go, when the policy is through with it. A row that a
        guide fails on gets ``error`` set.
        """
        try:
            self._prefill(rows, ends)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if len(rows) > 1:  # find the culprit; what is computed already is not done again
                for row, end in zip(rows, ends, strict=True):
                    self.prefill([row], [end])
            else:
                rows[0].error = one_line(error)

    def _prefill(self, rows: Sequence[Row], ends: Sequence[int]) -> None:
        self.policy.prefill([row.sequence for row in rows], keep=1, ends=ends)
        through = [i for i, row in enumerate(rows) if ends[i] >= row.length]
        for name, scorer in self.scorers.items():
            users = [i for i, row in enumerate(rows) if name in row.weights]
            if isinstance(scorer, TreeScorer):
                states: list[Any] = [rows[i].states[name] for i in users]
                scorer.prefill(states, [ends[i] for i in users])
            elif whole := [rows[i].states[name] for i in users if i in through]:
                scorer.prefill(whole)
        for i in through:
            rows[i].ready = True

    @torch.inference_mode()
    def step(self, rows: list[Row]) -> tuple[Step, list[float | None]]:
        """Advance every row by one token.

        A row whose model or guide fails gets ``error`` set and a meaningless token, and is not
        advanced.

        A row of an adaptive rule whose only candidate is certain to be taken is not scored; its
        guides read the token later, with the next that is.

        Returns:
            the step, and each row's composed score of its token (None if it was not scored).
        """
        batch = self._row_batch(rows)
        started = time.perf_counter()
        logits = self.policy.run([row.sequence for row in rows])
        based = time.perf_counter()
        candidates = top_candidates(logits, batch)
        batch = batch.narrowed(candidates)
        counts = zip(rows, batch.count.tolist(), strict=True)
        scored = [0 if not row.weights or _settled(row, n) else n for row, n in counts]
        ranked = time.perf_counter()
        scores = self._score(rows, candidates, scored)
        judged = time.perf_counter()
        positions = torch.tensor([len(r.sequence) for r in rows], device=logits.device)
        step = sample(logits, candidates, scores, batch, positions, scored)
        for i, row in enumerate(rows):
            if step.tokens[i] < 0 and row.error is None:
                row.error = self._failure(row, candidates.lse[i], scores[:, i])
            if row.error is None:
                row.append(step.tokens[i])
        ended = time.perf_counter()
        self.seconds["base"] += based - started
        self.seconds["scorer"] += judged - ranked
        self.seconds["rule"] += (ranked - based) + (ended - judged)
        known = [n > 0 and source >= 0 for n, source in zip(scored, step.sources, strict=True)]
        return step, [s if k else None for s, k in zip(step.scores, known, strict=True)]

    def _failure(self, row: Row, lse: Tensor, scores: Tensor) -> str:
        """Why a row gave no token: its log-sum-exp, or its scores ``[G, K]``, are not finite."""
        if not bool(torch.isfinite(lse)):
            return (
                f"the model gave logits that are not finite at step {row.steps}; "
                "try another dtype, such as bfloat16 or float32"
            )
        for name, given in zip(self.scorers, scores[:, : row.parameters.k], strict=True):
            bad = given[~torch.isfinite(given)]
            if len(bad) and row.weights.get(name):
                return (
                    f"guide {name!r} gave {float(bad[0])} at step {row.steps}; "
                    "allowed are finite scores"
                )
        raise AssertionError("a row without a token has a log-sum-exp or a score at fault")

    def _row_batch(self, rows: list[Row]) -> RowBatch:
        if self._batch is None or self._batch[0] != rows:
            built = RowBatch.build(
                [row.parameters for row in rows],
                [row.seed for row in rows],
                [row.weights for row in rows],
                list(self.scorers),
                self.policy.device,
            )
            self._batch = (list(rows), built)
        return self._batch[1]

    def _score(self, rows: list[Row], candidates: Candidates, counts: list[int]) -> Tensor:
        """Scores ``[G, N, K]`` fp32 of every guide; 0 where it was not asked.

        Args:
            rows: of the step.
            candidates: theirs.
            counts: how many of them to score.
        """
        values = candidates.values
        scores = values.new_zeros(len(self.scorers), *values.shape, dtype=torch.float32)
        if not any(counts):
            return scores
        ids = candidates.ids.tolist()
        for (name, scorer), own in zip(self.scorers.items(), scores, strict=True):
            users = [
                i
                for i, row in enumerate(rows)
                if counts[i] and name in row.weights and row.error is None
            ]
            if not users:
                continue
            wanted = [ids[i][: counts[i]] for i in users]
            for i, result in self._score_rows(name, scorer, rows, users, wanted):
                own[i, : len(result)] = result
        return scores

    def _score_rows(
        self, name: str, scorer: Scorer, rows: list[Row], users: list[int], wanted: list[list[int]]
    ) -> list[tuple[int, Tensor]]:
        """Each user's scores; a row whose scores cannot be had fails alone."""
        try:
            results = scorer.score([rows[i].states[name] for i in users], wanted)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if len(users) > 1:  # find the culprit: the others go on
                each = zip(users, wanted, strict=True)
                return [
                    p for i, ids in each for p in self._score_rows(name, scorer, rows, [i], [ids])
                ]
            row = rows[users[0]]
            what = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            row.error = f"guide {name!r} failed at step {row.steps}: {what}"
            return []
        return list(zip(users, results, strict=True))


def _settled(row: Row, count: int) -> bool:
    """Whether scores cannot matter: there is one candidate, and its score is no other token's."""
    return count == 1 and row.parameters.mass < 1 and row.parameters.fill != FILLS.index("none")
