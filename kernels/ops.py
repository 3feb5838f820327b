"""The ops, registered with ``torch.library``, so that ``torch.compile`` and CUDA graphs see them.

Contracts are those of ``reference``; each function here takes ``impl`` besides: ``auto``, or one
of ``dispatch.IMPLEMENTATIONS`` as an order. Nothing is mutated, outputs are new and contiguous,
results are deterministic, and where Triton does the work nothing waits for the device. Only the
reference has gradients, so ``auto`` takes it for tensors that need one.

Every function raises ``ValueError`` for an argument that is not as described (shape, dtype,
device, number), or if a forced implementation cannot do the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake

from . import checks, dispatch, reference
from .reference import GuidedSample, TreeLayout

_library = Library("fastguide", "DEF")


def _op(shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as ``torch.ops.fastguide.<its name>``; ``shapes`` is its fake.

    ``torch.library.custom_op`` does the same, but every call takes some 6 us longer: the price of
    hooks for gradients and mutation, of which there are none.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.removeprefix("_")
        schema = name + infer_schema(function, mutates_args=())
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        register_fake(f"fastguide::{name}", shapes, lib=_library)
        registered: Callable[..., Any] = getattr(torch.ops.fastguide, name).default
        return registered

    return register


# Each op is three small pieces: its shapes (for tracing), the registered op, the public function.


def _topk_logsumexp_shapes(
    logits: Tensor, k: int, inv_temperature: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty(rows, k, dtype=wide),
        logits.new_empty(rows, k, dtype=torch.int32),
        logits.new_empty(rows, dtype=torch.float64),
    )


@_op(_topk_logsumexp_shapes)
def _topk_logsumexp(
    logits: Tensor, k: int, inv_temperature: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.chosen(impl, logits, k=k).topk_logsumexp(logits, k, inv_temperature)


def topk_logsumexp(
    logits: Tensor, k: int, inv_temperature: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.topk_logsumexp``: values ``[N, k]``, ids ``[N, k]`` and lse ``[N]``."""
    checks.topk_logsumexp(logits, k, inv_temperature)
    if dispatch.differentiable(impl, logits, inv_temperature):
        return reference.topk_logsumexp(logits, k, inv_temperature)
    return _topk_logsumexp(logits, k, inv_temperature, impl)


def _guide_sample_shapes(logits: Tensor, *others: object) -> tuple[Tensor, ...]:
    whole = [logits.new_empty(logits.shape[0], dtype=torch.int64) for _ in range(2)]
    return (*whole, *(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4)))


@_op(_guide_sample_shapes)
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
    if dispatch.differentiable(impl, logits, values, lse, scores, guide_weights):
        return reference.guide_sample(*step, **row)
    return GuidedSample(*_guide_sample(*step, **row, impl=impl))


def _sample_tail_shapes(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(fraction, dtype=torch.int64), torch.empty_like(fraction)


@_op(_sample_tail_shapes)
def _sample_tail(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return dispatch.chosen(impl, logits).sample_tail(logits, inv_temperature, count, fraction)


def sample_tail(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """See ``reference.sample_tail``: token ``[N]`` and its ``z`` ``[N]``."""
    checks.sample_tail(logits, inv_temperature, count, fraction)
    if dispatch.differentiable(impl, logits, inv_temperature):
        return reference.sample_tail(logits, inv_temperature, count, fraction)
    return _sample_tail(logits, inv_temperature, count, fraction, impl)


def _tree_attention_shapes(query: Tensor, keys: Tensor, values: Tensor, *others: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[2])


@_op(_tree_attention_shapes)
def _tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    slot_starts: Tensor,
    slot_counts: Tensor,
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
    layout = TreeLayout(
        slots, slot_starts, slot_counts, row_starts, trunk, branch, max_slots, max_rows
    )
    head = max(query.shape[2], values.shape[2])
    module = dispatch.chosen(impl, query, keys, values, head=head)
    return module.tree_attention(
        query, keys, values, layout, scaling=scaling, window=window, softcap=softcap
    )


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
    checks.tree_attention(query, keys, values, *layout, window, softcap)
    if dispatch.differentiable(impl, query, keys, values):
        return reference.tree_attention(
            query, keys, values, layout, scaling=scaling, window=window, softcap=softcap
        )
    return _tree_attention(query, keys, values, *layout, scaling, window, softcap, impl)


def _lora_rows_shapes(base: Tensor, *others: object) -> Tensor:
    return base.new_empty(base.shape)


@_op(_lora_rows_shapes)
def _lora_rows(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: Tensor, impl: str
) -> Tensor:
    return dispatch.chosen(impl, base, x, a, b).lora_rows(base, x, a, b, segments)


def lora_rows(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: Tensor, impl: str = "auto"
) -> Tensor:
    """See ``reference.lora_rows``: ``[N, O]`` in the dtype of ``base``."""
    checks.lora_rows(base, x, a, b, segments)
    if dispatch.differentiable(impl, base, x, a, b):
        return reference.lora_rows(base, x, a, b, segments)
    return _lora_rows(base, x, a, b, segments, impl)


def _td_lambda_shapes(values: Tensor, *others: object) -> Tensor:
    return values.new_empty(values.shape)


@_op(_td_lambda_shapes)
def _td_lambda(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float, impl: str
) -> Tensor:
    module = dispatch.chosen(impl, values, rewards)
    return module.td_lambda(values, rewards, mask, gamma, lam)


def td_lambda(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float, impl: str = "auto"
) -> Tensor:
    """See ``reference.td_lambda``: targets ``[B, T]`` in the dtype of ``values``."""
    checks.td_lambda(values, rewards, mask, gamma, lam)
    if dispatch.differentiable(impl, values, rewards):
        return reference.td_lambda(values, rewards, mask, gamma, lam)
    return _td_lambda(values, rewards, mask, gamma, lam, impl)
