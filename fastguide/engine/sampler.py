"""One sampling step for a batch of rows: base logits and guide scores in, tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastguide import kernels
from fastguide.config import RowParameters
from fastguide.kernels import GuidedSample, reference


@dataclass(frozen=True)
class RowBatch:
    """Per-row parameters as tensors ``[N]``; built when the batch changes, not every step."""

    count: Tensor
    mode: Tensor
    scale: Tensor
    weight: Tensor
    inv_temperature: Tensor
    seed: Tensor
    guide_weights: Tensor
    """``[G, N]``; 0 where a row does not use a guide."""
    width: int
    """Columns to extract: the largest k, and one more, which bounds what lies past it."""
    mass: Tensor | None
    """fp64: how much of the base distribution candidates must hold; None if all k are scored."""

    @classmethod
    def build(
        cls,
        rows: Sequence[RowParameters],
        seeds: Sequence[int],
        weights: Sequence[Mapping[str, float]],
        guides: Sequence[str],
        device: torch.device,
    ) -> RowBatch:
        """Lay out the rows of a batch.

        Args:
            rows: what each row's rule lowered to.
            seeds: signed 64-bit seeds.
            weights: of the guides that each row uses.
            guides: names of all guides, in the order of ``guide_weights``.
            device: where the step runs.
        """

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        used = [[row.get(name, 0.0) for row in weights] for name in guides]
        return cls(
            count=column([r.k for r in rows], torch.int32),
            mode=column([mode_of(r) for r in rows], torch.int32),
            scale=column([r.scale for r in rows], torch.float64),
            weight=column([r.weight for r in rows], torch.float64),
            inv_temperature=column([r.inv_temperature for r in rows], torch.float32),
            seed=column(list(seeds), torch.int64),
            guide_weights=torch.tensor(used, dtype=torch.float64, device=device).view(
                len(guides), len(rows)
            ),
            width=max(r.k for r in rows) + 1,
            mass=column([r.mass for r in rows], torch.float64)
            if any(r.mass < 1 for r in rows)
            else None,
        )

    def select(self, index: list[int]) -> RowBatch:
        """Some of the rows, in this order."""
        if index == list(range(len(self.count))):
            return self
        at = torch.tensor(index, device=self.count.device)
        columns = "count mode scale weight inv_temperature seed".split()
        some: dict[str, Any] = {name: getattr(self, name)[at] for name in columns}
        some["mass"] = None if self.mass is None else self.mass[at]
        return replace(self, guide_weights=self.guide_weights[:, at], **some)

    def narrowed(self, candidates: Candidates) -> RowBatch:
        """The same rows with as many candidates as hold their ``mass``, at most k."""
        if self.mass is None:
            return self
        wide = candidates.values.double()
        share = torch.exp(wide - candidates.lse.double()[:, None])
        before = share.cumsum(1) - share  # what the candidates above a column hold
        needed = (before < self.mass[:, None]) & torch.isfinite(wide)
        count = needed.sum(1, dtype=torch.int32).clamp(min=1).minimum(self.count)
        return replace(self, count=torch.where(self.mass < 1, count, self.count))


def mode_of(row: RowParameters) -> int:
    """The bits of ``kernels.reference.guide_sample``'s ``mode``."""
    flags = row.greedy * reference.GREEDY + row.log_sigmoid * reference.LOG_SIGMOID
    return row.fill + flags


class Candidates(NamedTuple):
    """The top of each row's base distribution: what ``topk_logsumexp`` gives."""

    values: Tensor
    ids: Tensor
    lse: Tensor

    def widened(self, width: int) -> Candidates:
        """With so many columns; more than there are hold no candidate."""
        more = (0, width - self.ids.shape[1])
        return Candidates(
            F.pad(self.values, more, value=float("-inf")), F.pad(self.ids, more, value=-1), self.lse
        )


class Step(NamedTuple):
    """What a step gives for each row, as Python numbers (see ``reference.GuidedSample``)."""

    tokens: list[int]
    sources: list[int]
    scores: list[float]
    logprobs: list[float]
    base_logprobs: list[float]
    kl: list[float]
    scored: list[int]
    """How many candidates guides scored."""


def top_candidates(logits: Tensor, batch: RowBatch) -> Candidates:
    """The most likely tokens of each row.

    Args:
        logits: ``[N, V]``.
        batch: the rows' parameters.
    """
    width = min(batch.width, logits.shape[1])
    return Candidates(*kernels.topk_logsumexp(logits, width, batch.inv_temperature))


def draw(
    logits: Tensor, candidates: Candidates, scores: Tensor, batch: RowBatch, positions: Tensor
) -> GuidedSample:
    """One token per row, on the device; arguments as in ``sample``."""
    return kernels.guide_sample(
        logits,
        batch.inv_temperature,
        *candidates,
        scores,
        batch.guide_weights,
        count=batch.count,
        mode=batch.mode,
        scale=batch.scale,
        weight=batch.weight,
        seed=batch.seed,
        position=positions,
    )


def sample(
    logits: Tensor,
    candidates: Candidates,
    scores: Tensor,
    batch: RowBatch,
    positions: Tensor,
    scored: list[int],
) -> Step:
    """Draw one token per row from the guided distribution.

    Args:
        logits: ``[N, V]``; read again only by rows that draw from outside the candidates.
        candidates: of ``top_candidates``.
        scores: ``[G, N, K]`` fp32, each guide's scores of the candidates.
        batch: the rows' parameters.
        positions: ``[N]`` int64, the index of the new token in its sequence.
        scored: how many candidates of each row have scores.

    Returns:
        a ``Step``, with token -1 in rows whose logits or scores are not finite.
    """
    drawn = draw(logits, candidates, scores, batch, positions)
    numbers = torch.stack([column.double() for column in drawn]).tolist()  # one transfer
    tokens, sources, given, logprobs, base, kl = numbers
    whole = [int(t) for t in tokens], [int(s) for s in sources]
    return Step(*whole, given, logprobs, base, kl, scored)
