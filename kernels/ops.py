"""The ops, registered with ``torch.library``, so that ``torch.compile`` and CUDA graphs see them.

Contracts are those of ``reference``; each function here takes ``impl`` besides: ``auto``, or one
of ``dispatch.IMPLEMENTATIONS`` as an order. Nothing is mutated, outputs are new tensors, results
are deterministic, and no op waits for its device.

Every function raises ``ValueError`` for an argument that is not as described (shape, dtype,
device, number), or if a forced implementation cannot do the work.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from . import checks, dispatch
from .reference import GuidedSample, TreeLayout

# Each op is three small pieces: the registered op, its shapes (for tracing), the public function.


@custom_op("fastguide::topk_logsumexp", mutates_args=())
def _topk_logsumexp(
    logits: Tensor, k: int, inv_temperature: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.chosen(impl, logits, k=k).topk_logsumexp(logits, k, inv_temperature)


@_topk_logsumexp.register_fake
def _(logits: Tensor, k: int, inv_temperature: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty(rows, k, dtype=wide),
        logits.new_empty(rows, k, dtype=torch.int32),
        logits.new_empty(rows, dtype=torch.float64),
    )


def topk_logsumexp(
    logits: Tensor, k: int, inv_temperature: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.topk_logsumexp``: values ``[N, k]``, ids ``[N, k]`` and lse ``[N]``."""
    checks.topk_logsumexp(logits, k, inv_temperature)
    return _topk_logsumexp(logits, k, inv_temperature, impl)


@custom_op("fastguide::guide_sample", mutates_args=())
def _guide_sample(
    logits: Tensor,
    inv_temperature: Tensor,
    values: Tensor,
    ids: Tensor,
    lse: Tensor,
    scores: Tensor,
    guide_weights: Tensor,
    count: Tensor,
    mode: Tensor,
    scale: Tensor,
    weight: Tensor,
    seed: Tensor,
    position: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = dispatch.chosen(impl, logits, k=values.shape[1])
    return tuple(
        module.guide_sample(
            logits,
            inv_temperature,
            values,
            ids,
            lse,
            scores,
            guide_weights,
            count=count,
            mode=mode,
            scale=scale,
            weight=weight,
            seed=seed,
            position=position,
        )
    )


@_guide_sample.register_fake
def _(logits: Tensor, *others: object) -> tuple[Tensor, ...]:
    whole = [logits.new_empty(logits.shape[0], dtype=torch.int64) for _ in range(2)]
    return (*whole, *(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4)))


def guide_sample(
    logits: Tensor,
    inv_temperature: Tensor,
    values: Tensor,
    ids: Tensor,
    lse: Tensor,
    scores: Tensor,
    guide_weights: Tensor,
    *,
    count: Tensor,
    mode: Tensor,
    scale: Tensor,
    weight: Tensor,
    seed: Tensor,
    position: Tensor,
    impl: str = "auto",
) -> GuidedSample:
    """See ``reference.guide_sample``: token, source, score, log-probabilities and KL, ``[N]``."""
    row = {"count": count, "mode": mode, "scale": scale, "weight": weight}
    row |= {"seed": seed, "position": position}
    step = (logits, inv_temperature, values, ids, lse, scores, guide_weights)
    checks.guide_sample(*step, **row)
    return GuidedSample(*_guide_sample(*step, **row, impl=impl))


@custom_op("fastguide::sample_tail", mutates_args=())
def _sample_tail(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return dispatch.chosen(impl, logits).sample_tail(logits, inv_temperature, count, fraction)


@_sample_tail.register_fake
def _(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(fraction, dtype=torch.int64), torch.empty_like(fraction)


def sample_tail(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """See ``reference.sample_tail``: token ``[N]`` and its ``z`` ``[N]``."""
    checks.sample_tail(logits, inv_temperature, count, fraction)
    return _sample_tail(logits, inv_temperature, count, fraction, impl)


@custom_op("fastguide::tree_attention", mutates_args=())
def _tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    slot_starts: Tensor,
    row_starts: Tensor,
    trunk: Tensor,
    branch: Tensor,
    max_slots: int,
    max_rows: int,
    scaling: float,
    window: int,
    softcap: float,
    impl: str,
) -> Tensor:
    layout = TreeLayout(slots, slot_starts, row_starts, trunk, branch, max_slots, max_rows)
    module = dispatch.chosen(impl, query, keys, values)
    return module.tree_attention(
        query, keys, values, layout, scaling=scaling, window=window, softcap=softcap
    )


@_tree_attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, *others: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[2])


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: TreeLayout,
    *,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """See ``reference.tree_attention``: ``[N, H, E]`` in the dtype of ``query``."""
    checks.tree_attention(query, keys, values, *layout[:5], window, softcap)
    return _tree_attention(query, keys, values, *layout, scaling, window, softcap, impl)


@custom_op("fastguide::lora_rows", mutates_args=())
def _lora_rows(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: Tensor, impl: str
) -> Tensor:
    return dispatch.chosen(impl, base, x, a, b).lora_rows(base, x, a, b, segments)


@_lora_rows.register_fake
def _(base: Tensor, *others: object) -> Tensor:
    return base.new_empty(base.shape)


def lora_rows(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: Tensor, impl: str = "auto"
) -> Tensor:
    """See ``reference.lora_rows``: ``[N, O]`` in the dtype of ``base``."""
    checks.lora_rows(base, x, a, b, segments)
    return _lora_rows(base, x, a, b, segments, impl)


@custom_op("fastguide::td_lambda", mutates_args=())
def _td_lambda(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float, impl: str
) -> Tensor:
    module = dispatch.chosen(impl, values, rewards)
    return module.td_lambda(values, rewards, mask, gamma, lam)


@_td_lambda.register_fake
def _(values: Tensor, *others: object) -> Tensor:
    return values.new_empty(values.shape)


def td_lambda(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float, impl: str = "auto"
) -> Tensor:
    """See ``reference.td_lambda``: targets ``[B, T]`` in the dtype of ``values``."""
    checks.td_lambda(values, rewards, mask, gamma, lam)
    return _td_lambda(values, rewards, mask, gamma, lam, impl)
