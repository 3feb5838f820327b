"""One decode step for all running rows: policy, candidates, guides, sampling, commit.

Follow a token's logits here: ``_open`` has the policy give them and takes their top, the guides
score it (``_score``, or ``_leap`` where policy and guides share a pass), ``sample`` folds the
scores in and draws, ``append`` commits.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguide.cache import OutOfSlots
from fastguide.engine.program import FAILED, Programs
from fastguide.engine.rows import Row, RowSpec
from fastguide.engine.sampler import Candidates, RowBatch, Step, sample, top_candidates
from fastguide.engine.ways import Ways
from fastguide.models.decoder import Decoder
from fastguide.models.loading import one_line
from fastguide.scorer import Scorer, TreeScorer


class Opened(NamedTuple):
    """Rows whose candidates are known, and the logits these are from."""

    rows: list[Row]
    logits: Tensor
    """``[N, V]``."""
    candidates: Candidates

    def select(self, index: list[int]) -> Opened:
        """Some of the rows, in this order."""
        if index == list(range(len(self.rows))):
            return self
        at = torch.tensor(index, device=self.logits.device)
        some = Candidates(*(column.index_select(0, at) for column in self.candidates))
        return Opened([self.rows[i] for i in index], self.logits.index_select(0, at), some)

    def joined(self, other: Opened) -> Opened:
        """These rows, then the others."""
        width = max(part.candidates.ids.shape[1] for part in (self, other))
        mine, theirs = (part.candidates.widened(width) for part in (self, other))
        both = Candidates(*(torch.cat(pair) for pair in zip(mine, theirs, strict=True)))
        logits = torch.cat([self.logits, other.logits])
        return Opened([*self.rows, *other.rows], logits, both)


class ModelRunner:
    """Owns the loaded policy and guides; opens rows, prefills and steps them."""

    def __init__(
        self,
        policy: Decoder,
        scorers: Mapping[str, Scorer],
        way: str = "auto",
        fixed: bool = False,
    ) -> None:
        """Put guides beside a policy.

        Args:
            policy: a causal language model.
            scorers: loaded guides by name.
            way: how guides on the policy's weights run, one of ``ways.WAYS``.
            fixed: make steps of fixed shapes where that is possible, on a GPU as CUDA graphs. The
                pools of all models must be of fixed size before the first step.
        """
        self.policy = policy
        self.scorers = dict(scorers)
        self._programs: Programs | None = None
        self.ways = Ways(policy, self.scorers, way)
        if fixed and Programs.possible(policy, scorers):
            self._programs = Programs(policy, scorers)  # type: ignore[arg-type]
        self.seconds = {"base": 0.0, "scorer": 0.0, "rule": 0.0}
        """Time spent in each phase of all steps so far, for benchmarks."""
        self._batch: tuple[list[Row], RowBatch] | None = None
        self._opened: Opened | None = None

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
                    if name in weights and not self.ways.stateless(name):
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
            users = [i for i, row in enumerate(rows) if name in row.states]
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
        advanced. Nor is one with token -1 and no error: it has joined too late for a step that is
        on its way.

        A row of an adaptive rule whose only candidate is certain to be taken is not scored; its
        guides read the token later, with the next that is.

        Returns:
            the step, and each row's composed score of its token (None if it was not scored).
        """
        if self._programs is not None:
            if (done := self._replay(self._programs, rows)) is not None:
                return done
            self._programs.leave()
        started = time.perf_counter()
        whole = self._row_batch(rows)
        opened = self._open(rows, whole)
        batch = whole.narrowed(opened.candidates)
        counts = batch.count.tolist()
        pairs = zip(rows, counts, strict=True)
        scored = [0 if not row.weights or row.settled(n) else n for row, n in pairs]
        way, leaping = self.ways.choose(rows, counts)
        self.ways.taken[way] += 1
        based = time.perf_counter()
        scores, states = self._score(opened, counts, scored, leaping)
        judged = time.perf_counter()
        lengths = [len(row.sequence) for row in rows]
        positions = torch.tensor(lengths, device=opened.logits.device)
        step = sample(opened.logits, opened.candidates, scores, batch, positions, scored)
        for i, row in enumerate(rows):
            if step.tokens[i] < 0 and row.error is None:
                of_row = dict(zip(self.scorers, scores[:, i], strict=True))
                row.error = _failure(row, opened.candidates.lse[i], of_row)
            if row.error is None:
                row.append(step.tokens[i])
        self._opened = self._ahead(rows, whole, step, leaping, states)
        ended = time.perf_counter()
        self.seconds["base"] += based - started
        self.seconds["scorer"] += judged - based
        self.seconds["rule"] += ended - judged
        known = [n > 0 and source >= 0 for n, source in zip(scored, step.sources, strict=True)]
        return step, [s if k else None for s, k in zip(step.scores, known, strict=True)]

    def _replay(
        self, programs: Programs, rows: list[Row]
    ) -> tuple[Step, list[float | None]] | None:
        """``step`` by a program of fixed shapes; None if there is none, or it blames nobody."""
        way, leaping = self.ways.choose(rows, [row.parameters.k for row in rows])
        leapers = self.ways.trunk if way == "two-phase" else self.ways.leapers
        program = programs.of(rows, leapers if leaping else frozenset())
        if program is None:
            return None
        self._opened = None
        try:
            step, lanes = program.step(rows)
        except (torch.OutOfMemoryError, OutOfSlots):
            raise
        except Exception as error:  # laid out on the host, the step finds the row at fault
            warnings.warn(f"{FAILED}: {one_line(error)}", stacklevel=2)
            return None
        self.ways.taken[way] += 1
        for i, (row, lane) in enumerate(zip(rows, lanes, strict=True)):
            if step.tokens[i] < 0 and lane is not None:
                fixed = program.fixed
                assert fixed.candidates is not None
                assert fixed.scores is not None
                scores = dict(zip(fixed.scorers, fixed.scores[:, lane], strict=True))
                row.error = _failure(row, fixed.candidates.lse[lane], scores)
        known = [n > 0 and source >= 0 for n, source in zip(step.scored, step.sources, strict=True)]
        return step, [s if k else None for s, k in zip(step.scores, known, strict=True)]

    def _open(self, rows: list[Row], batch: RowBatch) -> Opened:
        """Logits and candidates of all rows: a pass of the policy for those that have none yet."""
        held, self._opened = self._opened, None
        places = {id(row): j for j, row in enumerate(held.rows)} if held is not None else {}
        fresh = [i for i, row in enumerate(rows) if id(row) not in places]
        known = [i for i, row in enumerate(rows) if id(row) in places]
        parts: list[Opened] = []
        if held is not None and known:
            parts.append(held.select([places[id(rows[i])] for i in known]))
        if fresh:
            logits = self.policy.run([rows[i].sequence for i in fresh])
            some = [rows[i] for i in fresh]
            parts.append(Opened(some, logits, top_candidates(logits, batch.select(fresh))))
        if len(parts) == 1:
            return parts[0]
        order = [*known, *fresh]
        return parts[0].joined(parts[1]).select([order.index(i) for i in range(len(rows))])

    def _ahead(
        self,
        rows: list[Row],
        batch: RowBatch,
        step: Step,
        leaping: list[int],
        states: Mapping[int, Tensor],
    ) -> Opened | None:
        """The next logits of rows whose token was a candidate that the policy has read already."""
        kept = [i for i in leaping if step.sources[i] >= 0 and rows[i].error is None]
        if not kept:
            return None
        hidden = torch.stack([states[i][step.sources[i]] for i in kept])
        logits = self.policy.logits(hidden)
        return Opened([rows[i] for i in kept], logits, top_candidates(logits, batch.select(kept)))

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

    def _score(
        self, opened: Opened, counts: list[int], scored: list[int], leaping: list[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """What the guides say of the candidates.

        Args:
            opened: the rows.
            counts: of their candidates.
            scored: how many of them to score.
            leaping: rows whose candidates the policy reads now, in one pass with its guides.

        Returns:
            scores ``[G, N, K]`` fp32, 0 where none was asked; and by leaping row the policy's
            hidden states ``[count, hidden]`` of its candidates.
        """
        values, rows = opened.candidates.values, opened.rows
        scores = values.new_zeros(len(self.scorers), *values.shape, dtype=torch.float32)
        if not (leaping or any(scored)):
            return scores, {}
        ids = opened.candidates.ids.tolist()
        states: dict[int, Tensor] = {}
        found: list[tuple[int, int, Tensor]] = []

        def ask(names: Collection[str]) -> None:
            for g, (name, scorer) in enumerate(self.scorers.items()):
                users = [
                    i
                    for i, row in enumerate(rows)
                    if scored[i] and name in row.weights and row.error is None
                ]
                if name in self.ways.inside:
                    users = [i for i in users if i not in states]
                if not (users and name in names):
                    continue

                def give(some: list[int], name: str = name, scorer: Scorer = scorer) -> Any:
                    wanted = [ids[i][: scored[i]] for i in some]
                    return scorer.score([rows[i].states[name] for i in some], wanted)

                given = _blaming(name, rows, users, give)
                found.extend((g, i, part) for i, part in given)

        # Other devices are given their work first, and are waited for last.
        ask(self.ways.beside)
        if leaping:
            branches: dict[int, list[tuple[int, ...]]]
            branches = {i: [(token,) for token in ids[i][: counts[i]]] for i in leaping}
            found.extend(self._leap(rows, branches, scored, states))
        ask(self.scorers.keys() - self.ways.beside.keys())
        for g, i, part in found:
            scores[g, i, : len(part)] = part
        return scores, states

    def _leap(
        self,
        rows: list[Row],
        branches: Mapping[int, list[tuple[int, ...]]],
        scored: list[int],
        states: dict[int, Tensor],
    ) -> Iterator[tuple[int, int, Tensor]]:
        """One pass of the policy and of the guides on its weights over candidates of rows.

        Args:
            rows: of the step.
            branches: by row, its candidates.
            scored: by row, how many of them to score.
            states: takes the policy's hidden states of the candidates.

        Yields:
            guide, row and scores ``[count]``.
        """
        inside = [(g, self.scorers[name], name) for g, name in enumerate(self.scorers)
                  if name in self.ways.inside]  # fmt: skip
        users = {
            g: [i for i in branches if scored[i] and name in rows[i].weights]
            for g, _, name in inside
        }
        sequences: list[Any] = [rows[i].sequence for i in branches]
        ends = list(branches.values())
        for g, _, name in inside:
            if not self.ways.stateless(name):
                sequences += [rows[i].states[name] for i in users[g]]
                ends += [branches[i] for i in users[g]]
        hidden = self.policy.run(sequences, ends, hidden=True)
        parts = iter(hidden.split([len(own) for own in ends]))
        states.update((i, next(parts)) for i in branches)
        for g, scorer, name in inside:
            if not users[g]:
                continue
            assert isinstance(scorer, TreeScorer)
            stateless = self.ways.stateless(name)
            mine = {i: states[i] if stateless else next(parts) for i in users[g]}

            def give(
                some: list[int], values: Any = scorer.values, mine: dict[int, Tensor] = mine
            ) -> Any:
                read = [mine[i] for i in some]
                return values(torch.cat(read)).split([len(part) for part in read])

            yield from ((g, i, part) for i, part in _blaming(name, rows, users[g], give))


def _blaming(
    name: str,
    rows: Sequence[Row],
    users: list[int],
    give: Callable[[list[int]], Sequence[Tensor]],
) -> list[tuple[int, Tensor]]:
    """Each user's scores by a guide; a row whose scores cannot be had fails alone.

    Args:
        name: of the guide.
        rows: of the step.
        users: rows that ask it, by index.
        give: the scores of some of them.
    """
    try:
        results = give(users)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if len(users) > 1:  # find the culprit: the others go on
            return [pair for i in users for pair in _blaming(name, rows, [i], give)]
        row = rows[users[0]]
        what = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        row.error = f"guide {name!r} failed at step {row.steps}: {what}"
        return []
    return list(zip(users, results, strict=True))


def _failure(row: Row, lse: Tensor, scores: Mapping[str, Tensor]) -> str:
    """Why a row gave no token: its log-sum-exp, or a guide's scores ``[K]``, are not finite."""
    if not bool(torch.isfinite(lse)):
        return (
            f"the model gave logits that are not finite at step {row.steps}; "
            "try another dtype, such as bfloat16 or float32"
        )
    for name, given in scores.items():
        given = given[: row.parameters.k]
        bad = given[~torch.isfinite(given)]
        if len(bad) and row.weights.get(name):
            return (
                f"guide {name!r} gave {float(bad[0])} at step {row.steps}; "
                "allowed are finite scores"
            )
    raise AssertionError("a row without a token has a log-sum-exp or a score at fault")
