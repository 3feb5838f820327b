"""One sampling step for a batch of rows: base logits and guide scores in, tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastguide.config import RowParameters
from fastguide.kernels import dispatch, reference


@dataclass(frozen=True)
class RowBatch:
    """Per-row parameters as tensors ``[N]``; built when the batch changes, not every step."""

    count: Tensor
    scale: Tensor
    weight: Tensor
    fill: Tensor
    greedy: Tensor
    inv_temperature: Tensor
    seed: Tensor
    width: int
    """Columns to extract: the largest k, and one more, which bounds what lies past it."""

    @classmethod
    def build(
        cls, rows: Sequence[RowParameters], seeds: Sequence[int], device: torch.device
    ) -> RowBatch:
        """Lay out the rows of a batch.

        Args:
            rows: what each row's rule lowered to.
            seeds: signed 64-bit seeds.
            device: where the step runs.
        """

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            count=column([r.k for r in rows], torch.int64),
            scale=column([r.scale for r in rows], torch.float64),
            weight=column([r.weight for r in rows], torch.float64),
            fill=column([r.fill for r in rows], torch.int64),
            greedy=column([r.greedy for r in rows], torch.bool),
            inv_temperature=column([r.inv_temperature for r in rows], torch.float32),
            seed=column(list(seeds), torch.int64),
            width=max(r.k for r in rows) + 1,
        )


@dataclass(frozen=True)
class Candidates:
    """The top of each row's base distribution: what ``topk_logsumexp`` gives."""

    values: Tensor
    ids: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Step:
    """What a step gives for each row, as Python lists."""

    tokens: list[int]
    sources: list[int]
    logprobs: list[float]
    base_logprobs: list[float]
    kl: list[float]


def top_candidates(logits: Tensor, batch: RowBatch) -> Candidates:
    """The most likely tokens of each row.

    Args:
        logits: ``[N, V]``.
        batch: the rows' parameters.
    """
    width = min(batch.width, logits.shape[1])
    return Candidates(*dispatch.topk_logsumexp(logits, width, batch.inv_temperature))


def sample(
    logits: Tensor, candidates: Candidates, scores: Tensor, batch: RowBatch, positions: Tensor
) -> Step:
    """Draw one token per row from the guided distribution.

    Args:
        logits: ``[N, V]``; read again only for rows that draw from outside the candidates.
        candidates: of ``top_candidates``.
        scores: ``[N, K]`` composed guide scores of the candidates.
        batch: the rows' parameters.
        positions: ``[N]`` int64, the index of the new token in its sequence.
    """
    drawn = reference.guide_sample(
        candidates.values,
        candidates.ids,
        candidates.lse,
        scores,
        count=batch.count,
        scale=batch.scale,
        weight=batch.weight,
        fill=batch.fill,
        greedy=batch.greedy,
        seed=batch.seed,
        position=positions,
        vocab=logits.shape[1],
    )
    token, logprob, base_logprob = drawn.token, drawn.logprob, drawn.base_logprob
    rows = torch.nonzero(token < 0)[:, 0]
    if len(rows):
        found, z = reference.sample_tail(
            logits, batch.inv_temperature, batch.count, drawn.fraction, rows
        )
        token[rows] = found
        logprob[rows] = (z - drawn.normaliser[rows]).float()
        base_logprob[rows] = (z - candidates.lse[rows]).float()
    return Step(
        token.tolist(),
        drawn.source.tolist(),
        logprob.tolist(),
        base_logprob.tolist(),
        drawn.kl.tolist(),
    )
