"""The PyTorch definition of every op: the specification that all other implementations follow.

Notation (one row = one request at one step): logits divided by the temperature are ``z``,
``A = logsumexp(z)`` over the vocabulary, ``b`` the bonus that a rule gives each candidate.
Each function runs on any device, allocates its outputs, mutates nothing and is deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FILL_MEAN, FILL_NONE, FILL_DROP = 0, 1, 2
"""What happens to tokens that were not scored: VAS eq. 4, the paper's ablation, ARGS."""

TAIL = -1
"""Value of ``source`` for a token that was drawn from outside the candidates."""


# ------------------------------------------------------------------------------- vocabulary


def sort_keys(values: Tensor, ids: Tensor) -> Tensor:
    """Pack fp32 values and ids into int64 keys: a larger key is a larger value, then a lower id.

    Args:
        values: fp32, any shape, no NaN.
        ids: integers below 2**31, broadcastable to ``values``.

    Returns:
        int64 of the broadcast shape. Keys are unique where ids are, so every sort is stable.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, which must tie
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (ordered << 32) | (0xFFFFFFFF - ids.to(torch.int64))


def topk_logsumexp(
    logits: Tensor, k: int, inv_temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k values with ids, and the log-sum-exp of whole rows, of logits at a row's temperature.

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64, any strides; -inf allowed, NaN and +inf not.
        k: how many to return, at least 1.
        inv_temperature: ``[N]`` fp32, positive.

    Returns:
        values ``[N, k]`` fp32 (fp64 for fp64 logits), sorted, of ``z = logits * inv_temperature``;
        ids ``[N, k]`` int32, ties broken by the lower id; lse ``[N]`` fp64 (differences from it
        are taken, and an fp32 near 20 is only known to 1e-6).
        Columns past the vocabulary hold -inf and id -1. NaN in a row makes its lse NaN.
    """
    double = logits.dtype == torch.float64
    wide = torch.float64 if double else torch.float32
    z = logits.to(wide) * inv_temperature.to(wide)[:, None]
    lse = torch.logsumexp(z.double(), dim=-1)
    vocab = z.shape[1]
    width = min(k, vocab)
    if double:
        order = torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :width]
    else:
        keys = sort_keys(z, torch.arange(vocab, device=z.device))
        order = 0xFFFFFFFF - (torch.topk(keys, width, dim=-1).values & 0xFFFFFFFF)
    values = z.gather(-1, order)
    ids = order.to(torch.int32)
    if width < k:
        values = F.pad(values, (0, k - width), value=float("-inf"))
        ids = F.pad(ids, (0, k - width), value=-1)
    return values, ids, lse


# ----------------------------------------------------------------------------------- random


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


# ----------------------------------------------------------------------------------- rules


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
        fill: ``[N]`` int64, one of the ``FILL_*`` codes.

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
    """int64: the token, or -1 where the tail was drawn and ``sample_tail`` must follow."""
    source: Tensor
    """int64: the index of the drawn candidate, or ``TAIL``."""
    fraction: Tensor
    """fp64: for a drawn tail, where in the tail's mass the draw fell, in [0, 1)."""
    logprob: Tensor
    """fp32: log-probability of the token under the guided distribution (NaN for a drawn tail)."""
    base_logprob: Tensor
    """fp32: its log-probability under the base distribution (NaN for a drawn tail)."""
    normaliser: Tensor
    """fp64: ``Z``, the log of the guided distribution's normaliser."""
    kl: Tensor
    """fp32: the exact KL divergence of the guided distribution from the base distribution."""


def guide_sample(
    values: Tensor,
    ids: Tensor,
    lse: Tensor,
    scores: Tensor,
    *,
    count: Tensor,
    scale: Tensor,
    weight: Tensor,
    fill: Tensor,
    greedy: Tensor,
    seed: Tensor,
    position: Tensor,
    vocab: int,
) -> GuidedSample:
    """Fold guide scores into the base distribution and draw a token from it, exactly.

    A candidate's unnormalised log-probability is ``u_i`` of :func:`guided_values`; all other
    tokens keep ``z_j`` (``FILL_MEAN``, ``FILL_NONE``) or get -inf (``FILL_DROP``). With the
    tail's log-mass ``T = A + log1p(-exp(C - A))`` and ``C = logsumexp_i(z_i)``, the normaliser
    is ``Z = logaddexp(logsumexp_i(u_i), T)``, so one pass over the vocabulary (the one that gave
    ``values`` and ``lse``) is enough for the exact distribution, and
    ``KL = sum_i P_i (u_i - z_i) + A - Z``.

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
        values: ``[N, K]`` fp32 or fp64, the K largest ``z``, sorted.
        ids: ``[N, K]`` integers, the token ids of ``values``.
        lse: ``[N]``, ``A``.
        scores: ``[N, K]`` composed guide scores; only the first ``count`` columns are read.
        count: ``[N]`` int64, how many of the columns are candidates, 1 to K. Each row needs one
            column more than that, unless the vocabulary ends there.
        scale: ``[N]`` factor of the base log-probability; 1 unless the fill is ``FILL_DROP``.
        weight: ``[N]`` factor of the score (VAS: beta).
        fill: ``[N]`` int64, one of the ``FILL_*`` codes.
        greedy: ``[N]`` bool.
        seed: ``[N]`` int64.
        position: ``[N]`` int64.
        vocab: V.

    Returns:
        A ``GuidedSample``. The arithmetic is fp64 throughout.
    """
    values, A = values.double(), lse.double()
    columns = torch.arange(values.shape[1], device=values.device)
    z = values.masked_fill(columns >= count[:, None], float("-inf"))
    chosen = torch.isfinite(z)
    u = guided_values(z, scores.double(), scale=scale.double(), weight=weight.double(), fill=fill)

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
    no_tail = torch.isneginf(tail)
    # Rounding can leave the last sum a little under 1; without a tail the last candidate takes it.
    index = torch.where(no_tail, torch.minimum(index, last), index)
    in_tail = index > last
    inside_mass = prob.sum(-1)
    fraction = ((draw - inside_mass) / torch.exp(tail - Z)).clamp(0.0, 1.0 - 2.0**-53)
    fraction = torch.where(in_tail, fraction, torch.zeros_like(fraction))

    best_value, best = u.max(dim=-1)
    other_wins = greedy & (fill != FILL_DROP) & (following > best_value)
    index = torch.where(greedy, torch.where(other_wins, count, best), index)
    source = torch.where(
        torch.where(greedy, other_wins, in_tail), torch.full_like(index, TAIL), index
    )
    needs_tail = in_tail & ~greedy

    safe = index.clamp_max(z.shape[1] - 1)[:, None]
    token = ids.to(torch.int64).gather(-1, safe)[:, 0]
    token = torch.where(needs_tail, torch.full_like(token, -1), token)
    picked_z = values.gather(-1, safe)[:, 0]
    picked_u = torch.where(other_wins, picked_z, u.gather(-1, safe)[:, 0])
    unknown = torch.full_like(picked_z, float("nan"))
    logprob = torch.where(needs_tail, unknown, picked_u - Z)
    base_logprob = torch.where(needs_tail, unknown, picked_z - A)
    return GuidedSample(
        token, source, fraction, logprob.float(), base_logprob.float(), Z, kl.float()
    )


def sample_tail(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from the tokens outside the candidates, for the few rows that need it.

    The tail is every token ranked ``count`` or later by descending logit (ties: lower id first).
    The draw is the first token at which the tail's cumulative mass, in that order, exceeds
    ``fraction`` of the whole tail.

    Args:
        logits: ``[N, V]`` as given to ``topk_logsumexp``.
        inv_temperature: ``[N]`` fp32.
        count: ``[N]`` int64, candidates per row.
        fraction: ``[N]`` fp64 in [0, 1).
        rows: ``[M]`` int64, the rows to draw for; the others are not read.

    Returns:
        token ``[M]`` int64 and its ``z`` ``[M]`` fp64.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = (logits[rows].to(wide) * inv_temperature[rows].to(wide)[:, None]).double()
    z, order = torch.sort(z, dim=-1, descending=True, stable=True)
    ranks = torch.arange(z.shape[1], device=z.device)
    inside = ranks < count[rows][:, None]
    top = z.masked_fill(inside, float("-inf")).max(dim=-1, keepdim=True).values
    mass = torch.exp(z - torch.nan_to_num(top, neginf=0.0)).masked_fill(inside, 0.0)
    cumulative = mass.cumsum(-1)
    target = fraction[rows][:, None] * cumulative[:, -1:]
    # Where rounding made a tail out of nothing, the last possible token takes the draw.
    last = torch.isfinite(z).sum(-1) - 1
    found = torch.minimum((cumulative <= target).sum(-1), last)[:, None]
    return order.gather(-1, found)[:, 0], z.gather(-1, found)[:, 0]


# -------------------------------------------------------------------------------- attention


class TreeLayout(NamedTuple):
    """Who sees whom in one pass: R requests, each with up to M rows over up to L slots.

    A request's slots are its prefix followed by the slots of its own rows in this pass. A row
    sees the prefix, its ancestors in the pass and itself: never a sibling, never a neighbour.
    """

    rows: Tensor
    """``[R, M]`` int64: index into the pass's N packed rows; padding repeats a row of R."""
    valid: Tensor
    """``[R, M]`` bool: False where ``rows`` is padding."""
    slots: Tensor
    """``[R, L]`` int64: slots of the KV pool; padding holds a slot of the same request (its
    values may be NaN) and is visible to no row."""
    visible: Tensor
    """``[R, M, L]`` bool."""
    row_positions: Tensor
    """``[R, M]`` int64: positions of the rows in their sequences."""
    slot_positions: Tensor
    """``[R, L]`` int64: positions of the slots' tokens."""

    def within(self, window: int) -> Tensor:
        """``visible`` cut to a sliding window: slots fewer than ``window`` positions back."""
        distance = self.row_positions[:, :, None] - self.slot_positions[:, None, :]
        return self.visible & (distance < window)


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: TreeLayout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of packed tree rows over a KV pool, as a plain softmax over the visible slots.

    Args:
        query: ``[N, H, D]``.
        keys: ``[S, H_kv, D]``, H a multiple of H_kv; query head h reads key head h // (H / H_kv).
        values: ``[S, H_kv, E]``.
        layout: the pass's ``TreeLayout``.
        scaling: factor of the dot products.
        window: slots ``window`` or more positions back are not seen (sliding-window attention).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma-2).

    Returns:
        ``[N, H, E]`` in the dtype of ``query``; the arithmetic is fp32, or fp64 for fp64 inputs.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // keys.shape[1]
    q = query[layout.rows].to(wide).transpose(1, 2)  # [R, H, M, D]
    k = keys[layout.slots].to(wide).transpose(1, 2).repeat_interleave(groups, dim=1)
    v = values[layout.slots].to(wide).transpose(1, 2).repeat_interleave(groups, dim=1)
    logits = q @ k.transpose(-1, -2) * scaling  # [R, H, M, L]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = layout.visible if window is None else layout.within(window)
    probs = torch.softmax(logits.masked_fill(~seen[:, None], float("-inf")), dim=-1)
    out = (probs @ v).transpose(1, 2).to(query.dtype)  # [R, M, H, E]
    result = query.new_empty(query.shape[0], query.shape[1], values.shape[2])
    result[layout.rows[layout.valid]] = out[layout.valid]
    return result


# --------------------------------------------------------------------------------- training


def td_lambda(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """TD(lambda) targets of state values (VAS section 2.2; Sutton and Barto, chapter 12).

    With the terminal reward as the value of the last state, ``G_T = r_T`` and, before it,
    ``G_t = r_t + gamma * ((1 - lam) * V_{t+1} + lam * G_{t+1})``. ``lam = 1`` gives Monte-Carlo
    returns, ``lam = 0`` one-step TD.

    Args:
        values: ``[B, T]`` estimated values of the states.
        rewards: ``[B, T]`` rewards on entering the states.
        mask: ``[B, T]`` bool, the states that count: one contiguous run per row.
        gamma: discount, in [0, 1].
        lam: in [0, 1].

    Returns:
        targets ``[B, T]`` in the dtype of ``values``; 0 outside the mask.
    """
    targets = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        more = mask[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(mask[:, t])
        ahead = values[:, t + 1] if t + 1 < values.shape[1] else following
        step = gamma * ((1.0 - lam) * ahead + lam * following)
        following = rewards[:, t] + torch.where(more, step, torch.zeros_like(step))
        following = torch.where(mask[:, t], following, torch.zeros_like(following))
        targets[:, t] = following
    return targets
