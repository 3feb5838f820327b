"""Whole sampling steps on any implementation, and what they should give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguide.config import ARGS, FUDGE, VAS, Plain, Rule
from fastguide.engine.sampler import mode_of
from fastguide.kernels import GuidedSample, guide_sample, topk_logsumexp

VOCAB = 40


def logits_of(rows: int, vocab: int = VOCAB, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    return torch.randn(rows, vocab, generator=generator) * scale


def scores_of(rows: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return torch.randn(rows, k, generator=generator)


def few(impl: Any, rows: int) -> int:
    """As many rows, or as many as Triton's interpreter does in a second."""
    return min(rows, 48) if impl.interpreted else rows


def lowered(rules: list[tuple[Rule, float]]) -> dict[str, Tensor]:
    """The rows' parameters as the op wants them."""
    rows = [rule.lower(temperature) for rule, temperature in rules]
    return {
        "count": torch.tensor([r.k for r in rows], dtype=torch.int32),
        "mode": torch.tensor([mode_of(r) for r in rows], dtype=torch.int32),
        "scale": torch.tensor([r.scale for r in rows], dtype=torch.float64),
        "weight": torch.tensor([r.weight for r in rows], dtype=torch.float64),
    }


def run(
    impl: Any,
    logits: Tensor,
    scores: Tensor,
    rule: Rule | list[tuple[Rule, float]],
    temperature: float,
    seeds: Tensor,
    position: int = 3,
    top: Any = None,
) -> tuple[GuidedSample, dict[str, Tensor]]:
    """One whole step, and what it read; ``scores`` are ``[N, K]`` of one guide of weight 1.

    The pass over the vocabulary is ``impl``'s as well, or that of ``top``.
    """
    rows, vocab = logits.shape
    rules = rule if isinstance(rule, list) else [(rule, temperature)] * rows
    inverse = torch.tensor([r.lower(t).inv_temperature for r, t in rules])
    k = min(max((r.k for r, _ in rules), default=1), vocab)
    values, ids, lse = (top or impl)(topk_logsumexp, logits, min(k + 1, vocab), inverse)
    padded = torch.full((1, *values.shape), float("nan"))  # of no candidate: must not be read
    padded[0, :, :k] = scores[:, :k]
    out = impl(
        guide_sample,
        logits,
        inverse,
        values,
        ids,
        lse,
        padded,
        torch.ones(1, rows, dtype=torch.float64),
        **lowered(rules),
        seed=seeds,
        position=torch.full((rows,), position),
    )
    return out, {"values": values, "ids": ids, "lse": lse}


def definition(logits: Tensor, scores: Tensor, rule: Rule, temperature: float) -> Tensor:
    """Log-probabilities ``[N, V]`` of the paper's equations, over the whole vocabulary in fp64."""
    tau = temperature or 1.0
    logits, scores = logits.double(), scores.double()
    base = torch.log_softmax(logits / tau, dim=-1)
    if isinstance(rule, Plain):
        return base
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : rule.k]
    s = scores[:, : rule.k]
    nothing = torch.full_like(base, float("-inf"))
    if isinstance(rule, ARGS):
        w = rule.weight
        own = torch.log_softmax(logits, dim=-1).gather(1, order)
        score = (1 - w) * own + w * s if rule.form == "interpolated" else own + w * s
        return nothing.scatter(1, order, torch.log_softmax(score / tau, dim=-1))
    if isinstance(rule, FUDGE):
        product = base.gather(1, order) + rule.weight * torch.nn.functional.logsigmoid(s)
        return nothing.scatter(1, order, torch.log_softmax(product, dim=-1))
    if rule.fill == "mean":
        values = s.mean(-1, keepdim=True).expand_as(base)
    elif rule.fill == "none":
        values = torch.zeros_like(base)
    else:
        values = torch.full_like(base, float("-inf" if rule.beta >= 0 else "inf"))
    values = values.scatter(1, order, s)
    bonus = torch.where(values.isinf(), float("-inf"), rule.beta * values)
    return torch.log_softmax(base + bonus, dim=-1)


RULES: list[tuple[Rule, float]] = [
    (VAS(beta=2.0, k=6), 0.7),
    (VAS(beta=-3.0, k=6), 1.0),
    (VAS(beta=2.0, k=6, fill="none"), 0.7),
    (VAS(beta=2.0, k=6, fill="drop"), 1.3),
    (VAS(beta=2.0, k=VOCAB), 0.7),
    (VAS(beta=1.0, k=1), 1.0),
    (ARGS(weight=1.5, k=6), 0.7),
    (ARGS(weight=0.4, k=6, form="interpolated"), 1.2),
    (FUDGE(k=6), 0.9),
    (FUDGE(weight=3.0, k=6), 1.0),
    (Plain(k=3), 0.7),
]


def reference_impl(op: Any, *arguments: Any, **keywords: Any) -> Any:
    """An implementation as the fixture ``impl`` gives it: the reference."""
    return op(*arguments, **keywords, impl="reference")
