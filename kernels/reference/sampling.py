"""From base values and guide scores to a token: rules, normaliser, KL and draw."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .vocabulary import sample_tail

FILL_MEAN, FILL_NONE, FILL_DROP = 0, 1, 2
"""What happens to tokens that were not scored: VAS eq. 4, the paper's ablation, ARGS."""

FILL, GREEDY, LOG_SIGMOID = 3, 4, 8
"""Bits of a row's ``mode``: its fill code, the mode instead of a draw, FUDGE's log sigma."""

TAIL = -1
"""Value of ``source`` for a token that was drawn from outside the candidates."""


def philox_uniform(seed: Tensor, position: Tensor) -> Tensor:
    """One uniform number per row, a pure function of (seed, position): Philox 4x32-10.

    Counter-based (Salmon et al., SC 2011), so that neither the batch nor the neighbours of a
    request can change what it draws. Key: the two halves of the seed; counter: (position, 0, 0, 0).

    Args:
        seed: ``[N]`` int64.
        position: ``[N]`` int64, 0 to 2**32 - 1: the index of the token in its sequence.

    Returns:
        ``[N]`` fp64 in [0, 1), 53 random bits.
    """
    low = 0xFFFFFFFF

    def mul(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """High and low 32 bits of a product of 32-bit numbers, within signed 64-bit arithmetic."""
        upper = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
        return upper & low, (a * b) & low

    key0, key1 = seed & low, (seed >> 32) & low
    c0 = position & low
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        hi0, lo0 = mul(0xD2511F53, c0)
        hi1, lo1 = mul(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return ((c0 << 21) | (c1 >> 11)).to(torch.float64) * 2.0**-53


def composed_scores(scores: Tensor, guide_weights: Tensor, count: Tensor, mode: Tensor) -> Tensor:
    """``s = sum_g w_g f(V_g)`` per candidate; ``f`` is log sigma for FUDGE, else the identity.

    Args:
        scores: ``[G, N, K]`` fp32 or fp64, what each guide gave; columns from ``count`` on and
            guides of weight 0 are not read.
        guide_weights: ``[G, N]`` fp64.
        count: ``[N]`` int32, how many of the columns are candidates.
        mode: ``[N]`` int32.

    Returns:
        ``[N, K]`` fp64, 0 in the columns that are no candidates.
    """
    columns = torch.arange(scores.shape[2], device=scores.device)
    read = (columns < count[:, None]) & (guide_weights != 0)[:, :, None]
    found = scores.double().masked_fill(~read, 0.0)
    squash = ((mode & LOG_SIGMOID) != 0)[:, None]
    found = torch.where(squash & read, F.logsigmoid(found), found)
    return (guide_weights.double()[:, :, None] * found).sum(0)


def guided_values(
    z: Tensor, scores: Tensor, *, scale: Tensor, weight: Tensor, fill: Tensor
) -> Tensor:
    """Unnormalised log-probabilities of the candidates under a rule.

    ``u_i = scale * z_i + b_i`` with ``b_i = weight * (s_i - mean(s))`` for ``FILL_MEAN`` and
    ``weight * s_i`` otherwise. ``FILL_MEAN`` is VAS eq. 4: subtracting the common shift
    ``beta * mean(s)`` from every token leaves the other V - k logits alone.

    Args:
        z: ``[N, K]`` fp64, base logits over the temperature; -inf marks a column that is no
            candidate.
        scores: ``[N, K]`` fp64; not read where ``z`` is -inf.
        scale: ``[N]`` factor of the base log-probability.
        weight: ``[N]`` factor of the score.
        fill: ``[N]``, one of the ``FILL_*`` codes.

    Returns:
        ``[N, K]`` fp64; -inf where ``z`` is.
    """
    chosen = torch.isfinite(z)
    s = torch.where(chosen, scores, torch.zeros_like(scores))
    mean = s.sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True).clamp_min(1)
    shift = torch.where((fill == FILL_MEAN)[:, None], mean, torch.zeros_like(mean))
    u = scale[:, None] * z + weight[:, None] * (s - shift)
    return torch.where(chosen, u, torch.full_like(u, float("-inf")))


class GuidedSample(NamedTuple):
    """What one sampling step gives, each ``[N]``."""

    token: Tensor
    """int64: the token; -1 in a row whose numbers are not finite, which then has NaN elsewhere."""
    source: Tensor
    """int64: the index of the drawn candidate, or ``TAIL``."""
    score: Tensor
    """fp32: the composed score of the drawn candidate; NaN for a token that was not scored."""
    logprob: Tensor
    """fp32: log-probability of the token under the guided distribution."""
    base_logprob: Tensor
    """fp32: its log-probability under the base distribution."""
    kl: Tensor
    """fp32: the exact KL divergence of the guided distribution from the base distribution."""


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
) -> GuidedSample:
    """Fold guide scores into the base distribution and draw a token from it, exactly.

    A candidate's unnormalised log-probability is ``u_i`` of :func:`guided_values` at the scores
    of :func:`composed_scores`; all other tokens keep ``z_j`` (``FILL_MEAN``, ``FILL_NONE``) or
    get -inf (``FILL_DROP``). With the tail's log-mass ``T = A + log1p(-exp(C - A))`` and
    ``C = logsumexp_i(z_i)``, the normaliser is ``Z = logaddexp(logsumexp_i(u_i), T)``, so one
    pass over the vocabulary (the one that gave ``values`` and ``lse``) is enough for the exact
    distribution, and ``KL = sum_i P_i (u_i - z_i) + A - Z``. The logits are read again only by
    rows that draw from the tail (:func:`sample_tail`).

    ``A - C`` cancels where the tail is tiny, and a guide that forbids the likely tokens would
    magnify the rounding. So T is held between what the tail must weigh at least and can weigh at
    most: between ``z_{k+1}`` and ``z_{k+1} + log(V - k)``.

    The draw inverts the distribution function along the vocabulary in order of descending base
    logit, so at zero weight the token does not depend on how many candidates there are.

    Greedy rows take the mode: the best candidate, or the best other token (column ``count`` of
    ``values``) where that is strictly better, which only ``FILL_NONE`` allows: under
    ``FILL_MEAN`` some candidate's bonus is at least 0. Their KL and log-probabilities are those
    of the distribution whose mode it is.

    Args:
        logits: ``[N, V]`` as given to ``topk_logsumexp``.
        inv_temperature: ``[N]`` fp32, likewise.
        values: ``[N, K]`` fp32 or fp64, as ``topk_logsumexp`` gives them.
        ids: ``[N, K]`` int32, likewise.
        lse: ``[N]`` fp64, ``A``, likewise.
        scores: ``[G, N, K]`` fp32 or fp64, what each of G guides gave; G may be 0.
        guide_weights: ``[G, N]`` fp64, ``w_g``; a guide of weight 0 is not read.
        count: ``[N]`` int32, how many of the columns are candidates, 1 to K. Each row needs one
            column more than that, unless the vocabulary ends there.
        mode: ``[N]`` int32: a ``FILL_*`` code, plus ``GREEDY``, plus ``LOG_SIGMOID``.
        scale: ``[N]`` fp64, factor of the base log-probability; 1 unless the fill is
            ``FILL_DROP``.
        weight: ``[N]`` fp64, factor of the score (VAS: beta).
        seed: ``[N]`` int64.
        position: ``[N]`` int64, see :func:`philox_uniform`.

    Returns:
        A ``GuidedSample``. The arithmetic is fp64 throughout.
    """
    vocab = logits.shape[1]
    values, A = values.double(), lse.double()
    fill, greedy, count = mode & FILL, (mode & GREEDY) != 0, count.long()
    s = composed_scores(scores, guide_weights, count, mode)
    sound = torch.isfinite(A) & torch.isfinite(s).all(-1)
    A = A.masked_fill(~sound, 0.0)
    columns = torch.arange(values.shape[1], device=values.device)
    z = values.masked_fill(columns >= count[:, None], float("-inf"))
    chosen = torch.isfinite(z)
    u = guided_values(z, s, scale=scale.double(), weight=weight.double(), fill=fill)

    inside = torch.logsumexp(z, dim=-1)
    tail = A + torch.log1p(-torch.exp((inside - A).clamp_max(0.0)))
    following = F.pad(values, (0, 1), value=float("-inf")).gather(-1, count[:, None])[:, 0]
    most = following + torch.log((vocab - count).clamp_min(1).double())
    tail = torch.minimum(torch.maximum(tail, following), most)
    tail = tail.masked_fill(fill == FILL_DROP, float("-inf"))
    Z = torch.logaddexp(torch.logsumexp(u, dim=-1), tail)
    prob = torch.exp(u - Z[:, None])
    difference = torch.where(chosen, u - z, torch.zeros_like(u))
    kl = ((prob * difference).sum(-1) + A - Z).clamp_min(0.0)  # rounding can leave -1e-9

    cumulative = prob.cumsum(-1)
    draw = philox_uniform(seed, position)
    index = (cumulative <= draw[:, None]).sum(-1)
    last = chosen.sum(-1) - 1
    # Rounding can leave the last sum a little under 1; without a tail the last candidate takes it.
    index = torch.where(torch.isneginf(tail), torch.minimum(index, last), index)
    in_tail = index > last
    fraction = ((draw - cumulative[:, -1]) / torch.exp(tail - Z)).clamp(0.0, 1.0 - 2.0**-53)

    best_value, best = u.max(dim=-1)
    other_wins = greedy & (fill != FILL_DROP) & (following > best_value)
    index = torch.where(greedy, torch.where(other_wins, count, best), index)
    source = torch.where(
        torch.where(greedy, other_wins, in_tail), torch.full_like(index, TAIL), index
    )
    drawn = in_tail & ~greedy & sound
    tail_token, tail_z = sample_tail(
        logits, inv_temperature, count, torch.where(drawn, fraction, torch.full_like(fraction, -1))
    )

    safe = index.clamp_max(z.shape[1] - 1)[:, None]
    token = torch.where(drawn, tail_token, ids.long().gather(-1, safe)[:, 0])
    picked_z = torch.where(drawn, tail_z, values.gather(-1, safe)[:, 0])
    picked_u = torch.where(drawn | other_wins, picked_z, u.gather(-1, safe)[:, 0])
    score = s.gather(-1, safe)[:, 0].masked_fill(source == TAIL, float("nan"))
    numbers = (score, picked_u - Z, picked_z - A, kl)
    return GuidedSample(
        token.masked_fill(~sound, -1),
        source.masked_fill(~sound, TAIL),
        *(number.masked_fill(~sound, float("nan")).float() for number in numbers),
    )
