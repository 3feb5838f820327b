"""The sampling step against its definition over the full vocabulary, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from fastguide.config import ARGS, VAS, Plain, Rule
from fastguide.kernels import dispatch, native, reference

VOCAB = 40


def logits_of(rows: int, vocab: int = VOCAB, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    return torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale


def scores_of(rows: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return torch.randn(rows, k, generator=generator, dtype=torch.float64)


def run(
    logits: Tensor, scores: Tensor, rule: Rule, temperature: float, seeds: Tensor, position: int = 3
) -> tuple[reference.GuidedSample, dict[str, Tensor]]:
    """One whole step of the reference ops, tail included, and what it read."""
    rows = logits.shape[0]
    row = rule.lower(temperature)

    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype)

    inverse = full(row.inv_temperature, torch.promote_types(logits.dtype, torch.float32))
    width = min(row.k + 1, logits.shape[1])
    values, ids, lse = reference.topk_logsumexp(logits, width, inverse)
    padded = torch.zeros_like(values)
    padded[:, : row.k] = scores[:, : row.k].to(padded)
    count = full(row.k, torch.int64)
    out = reference.guide_sample(
        values,
        ids,
        lse,
        padded,
        count=count,
        scale=full(row.scale, torch.float64),
        weight=full(row.weight, torch.float64),
        fill=full(row.fill, torch.int64),
        greedy=full(row.greedy, torch.bool),
        seed=seeds,
        position=full(position, torch.int64),
        vocab=logits.shape[1],
    )
    token = out.token.clone()
    tail = torch.nonzero(token < 0)[:, 0]
    if len(tail):
        found, _ = reference.sample_tail(logits, inverse, count, out.fraction, tail)
        token[tail] = found
    return out._replace(token=token), {"values": values, "ids": ids, "lse": lse}


def definition(logits: Tensor, scores: Tensor, rule: Rule, temperature: float) -> Tensor:
    """Log-probabilities ``[N, V]`` of eq. 4 or of ARGS, written over the whole vocabulary."""
    tau = temperature or 1.0
    base = torch.log_softmax(logits / tau, dim=-1)
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : rule.k]
    if isinstance(rule, Plain):
        return base
    s = scores[:, : rule.k]
    if isinstance(rule, ARGS):
        w = rule.weight
        own = torch.log_softmax(logits, dim=-1).gather(1, order)
        score = (1 - w) * own + w * s if rule.form == "interpolated" else own + w * s
        return torch.full_like(base, float("-inf")).scatter(
            1, order, torch.log_softmax(score / tau, dim=-1)
        )
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
    (Plain(k=3), 0.7),
]


@pytest.mark.parametrize(("rule", "temperature"), RULES)
def test_log_probabilities_and_kl_are_those_of_the_definition(
    rule: Rule, temperature: float
) -> None:
    logits, scores = logits_of(64), scores_of(64, rule.k)
    out, _ = run(logits, scores, rule, temperature, torch.arange(64))
    guided = definition(logits, scores, rule, temperature)
    base = torch.log_softmax(logits / temperature, dim=-1)
    kl = (guided.exp() * torch.where(guided.isinf(), 0.0, guided - base)).sum(-1)
    assert torch.allclose(out.kl.double(), kl, atol=1e-6)
    inside = out.source >= 0
    picked = out.token[:, None]
    assert torch.allclose(
        out.logprob.double()[inside], guided.gather(1, picked)[inside, 0], atol=1e-5
    )
    assert torch.allclose(
        out.base_logprob.double()[inside], base.gather(1, picked)[inside, 0], atol=1e-5
    )
    normaliser = out.normaliser[:, None]
    outside = torch.log_softmax(logits / temperature, dim=-1) + torch.logsumexp(
        logits / temperature, -1, keepdim=True
    )
    tail_logprob = (outside - normaliser).gather(1, picked)[~inside, 0]
    assert torch.allclose(tail_logprob, guided.gather(1, picked)[~inside, 0], atol=1e-9)


@pytest.mark.parametrize(("rule", "temperature"), RULES)
def test_sampled_frequencies_match_the_definition(rule: Rule, temperature: float) -> None:
    """χ² of 100,000 draws, the tail included; unscored and forbidden tokens never appear."""
    draws = 100_000
    logits, scores = logits_of(1), scores_of(1, rule.k)
    expected = definition(logits, scores, rule, temperature).exp()[0] * draws
    out, _ = run(
        logits.expand(draws, -1), scores.expand(draws, -1), rule, temperature, torch.arange(draws)
    )
    counts = torch.bincount(out.token, minlength=VOCAB).double()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    rest = counts[~common].sum(), expected[~common].sum()
    observed = torch.cat([counts[common], rest[0][None]])
    wanted = torch.cat([expected[common], rest[1][None]])
    if wanted[-1] < 1e-9:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) > 1:
        assert chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize(
    ("top", "scores", "rule"),
    [
        ([28.0, 14.3, *[3.0] * 18], [-1.0, *[0.0] * 19], VAS(15.0, 20)),
        ([20.0, 6.3, -30.0], [-1.0, 0.0, 0.0], VAS(40.0, 3, "none")),
        ([20.0, 6.3, -30.0], [-1.0, 0.0, 0.0], VAS(40.0, 2)),
        ([9.0, 8.5, 1.0], [-1.0, -0.9, 0.0], VAS(30.0, 3)),
    ],
)
def test_a_forbidden_favourite_does_not_magnify_rounding(
    top: list[float], scores: list[float], rule: VAS, impl: str
) -> None:
    """fp32 logits, a tail of next to no mass, and a guide that rules the likely tokens out."""
    if impl == "native" and not native.available():
        pytest.skip("the native extension is not built")
    rows, vocab = 20_000, 40 if rule.k == 20 else 3
    logits = torch.tensor([*top, *[-30.0] * (vocab - len(top))]).expand(rows, -1).contiguous()
    values, ids, lse = dispatch.topk_logsumexp(
        logits, min(rule.k + 1, vocab), torch.ones(rows), impl=impl
    )
    padded = torch.zeros_like(values)
    padded[:, : rule.k] = torch.tensor(scores)[: rule.k]
    row = rule.lower(1.0)
    out = reference.guide_sample(
        values,
        ids,
        lse,
        padded,
        count=torch.full((rows,), rule.k),
        scale=torch.ones(rows),
        weight=torch.full((rows,), row.weight),
        fill=torch.full((rows,), row.fill),
        greedy=torch.zeros(rows, dtype=torch.bool),
        seed=torch.arange(rows),
        position=torch.zeros(rows, dtype=torch.int64),
        vocab=vocab,
    )
    guided = definition(logits[:1].double(), torch.tensor([scores]).double(), rule, 1.0)
    base = torch.log_softmax(logits[:1].double(), -1)
    kl = float((guided.exp() * (guided - base)).sum())
    assert out.kl[0].item() == pytest.approx(kl, rel=1e-4)
    inside = guided[0, : rule.k].exp().sum()
    if inside > 1 - 1e-9:
        assert (out.source >= 0).all()
    counts = torch.bincount(out.token[out.source >= 0], minlength=vocab) / rows
    assert torch.allclose(counts.double()[: rule.k], guided[0, : rule.k].exp(), atol=0.02)


def test_zero_weight_draws_the_base_models_token_whatever_k_is() -> None:
    logits, seeds = logits_of(5000), torch.arange(5000)
    plain, _ = run(logits, scores_of(5000, 1), Plain(k=1), 0.9, seeds)
    for rule in (VAS(0.0, 3), VAS(0.0, 20), VAS(0.0, 7, "none"), VAS(0.0, VOCAB), Plain(k=11)):
        guided, _ = run(logits, scores_of(5000, rule.k), rule, 0.9, seeds)
        assert torch.equal(guided.token, plain.token), rule
        assert guided.kl.abs().max() < 1e-6


def test_a_constant_score_is_the_identity() -> None:
    logits, seeds = logits_of(2000), torch.arange(2000)
    plain, _ = run(logits, scores_of(2000, 1), Plain(), 0.8, seeds)
    constant = torch.full((2000, 9), 3.7, dtype=torch.float64)
    guided, _ = run(logits, constant, VAS(beta=5.0, k=9), 0.8, seeds)
    assert torch.equal(guided.token, plain.token)
    assert guided.kl.abs().max() < 1e-6


def test_a_shift_of_all_scores_changes_nothing_with_mean_fill() -> None:
    logits, scores, seeds = logits_of(2000), scores_of(2000, 9), torch.arange(2000)
    one, _ = run(logits, scores, VAS(beta=2.0, k=9), 0.8, seeds)
    two, _ = run(logits, scores + 100.0, VAS(beta=2.0, k=9), 0.8, seeds)
    assert torch.equal(one.token, two.token)


@pytest.mark.parametrize(
    "rule",
    [VAS(2.0, 6), VAS(-2.0, 6), VAS(-50.0, 2, "none"), VAS(2.0, 6, "drop"), ARGS(1.5, 6), Plain(4)],
)
def test_greedy_takes_the_mode(rule: Rule) -> None:
    logits, scores = logits_of(500), scores_of(500, rule.k)
    out, _ = run(logits, scores, rule, 0.0, torch.arange(500))
    guided = definition(logits, scores, rule, 0.0)
    assert torch.equal(out.token, guided.argmax(-1))
    assert torch.allclose(out.logprob.double(), guided.max(-1).values, atol=1e-5)
    if rule == VAS(-50.0, 2, "none"):
        assert (out.source == reference.TAIL).any()  # the case this rule is here for


def test_rows_with_different_parameters_do_not_touch_each_other() -> None:
    rules: list[tuple[Rule, float]] = [(VAS(2.0, 3), 0.7), (ARGS(1.0, 6), 1.0), (Plain(2), 1.3)]
    logits, scores, width = logits_of(3), scores_of(3, 7), 7
    seeds = torch.tensor([5, 6, 7])
    rows = [rule.lower(t) for rule, t in rules]
    inverse = torch.tensor([r.inv_temperature for r in rows], dtype=torch.float64)
    values, ids, lse = reference.topk_logsumexp(logits, width, inverse)
    together = reference.guide_sample(
        values,
        ids,
        lse,
        scores,
        count=torch.tensor([r.k for r in rows]),
        scale=torch.tensor([r.scale for r in rows]),
        weight=torch.tensor([r.weight for r in rows]),
        fill=torch.tensor([r.fill for r in rows]),
        greedy=torch.tensor([r.greedy for r in rows]),
        seed=seeds,
        position=torch.full((3,), 3),
        vocab=VOCAB,
    )
    for i, (rule, temperature) in enumerate(rules):
        alone, _ = run(logits[i : i + 1], scores[i : i + 1], rule, temperature, seeds[i : i + 1])
        assert torch.allclose(together.kl[i], alone.kl[0], atol=1e-6)
        assert torch.allclose(together.normaliser[i], alone.normaliser[0])
        if together.source[i] >= 0:
            assert together.token[i] == alone.token[0]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((4000, VOCAB), float("-inf"), dtype=torch.float64)
    logits[:, [3, 17]] = torch.tensor([0.3, 0.1], dtype=torch.float64)
    for rule in (VAS(2.0, 1), VAS(2.0, 2), VAS(2.0, 8), ARGS(1.0, 8), Plain(5)):
        out, _ = run(logits, scores_of(4000, rule.k), rule, 1.0, torch.arange(4000))
        assert set(out.token.tolist()) <= {3, 17}, rule
        assert torch.isfinite(out.kl).all()


def test_extreme_weights_stay_finite() -> None:
    logits, scores = logits_of(50), scores_of(50, 6) * 1e4
    for rule in (VAS(1e4, 6), VAS(-1e4, 6), ARGS(1e4, 6)):
        out, _ = run(logits, scores, rule, 1.0, torch.arange(50))
        assert torch.isfinite(out.kl).all()
        assert (out.token >= 0).all()


def philox_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python integers, from the paper."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        low = 0xFFFFFFFF
        counter = [
            (b >> 32) ^ counter[1] ^ key[0],
            b & low,
            (a >> 32) ^ counter[3] ^ key[1],
            a & low,
        ]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


def test_philox_is_the_published_generator() -> None:
    # The first known-answer vector of the Random123 distribution.
    assert philox_words([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seeds = [0, 1, -1, 2**62 + 12345, -(2**63)]
    positions = [0, 1, 7, 2**31, 2**32 - 1]
    drawn = reference.philox_uniform(torch.tensor(seeds), torch.tensor(positions))
    for seed, position, value in zip(seeds, positions, drawn.tolist(), strict=True):
        key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
        words = philox_words([position, 0, 0, 0], key)
        assert value == ((words[0] << 21) | (words[1] >> 11)) * 2.0**-53


def test_empty_batches() -> None:
    out, _ = run(logits_of(0), scores_of(0, 4), VAS(1.0, 4), 1.0, torch.empty(0, dtype=torch.int64))
    assert all(field.shape == (0,) for field in out)


def test_k_equal_to_the_vocabulary_is_full_vocabulary_vas() -> None:
    """Eq. 2 over the whole vocabulary, with no approximation left."""
    logits, scores = logits_of(32), scores_of(32, VOCAB)
    out, read = run(logits, scores, VAS(beta=1.7, k=VOCAB), 1.0, torch.arange(32))
    by_token = torch.zeros_like(logits).scatter(1, read["ids"].long(), scores)
    exact = torch.log_softmax(torch.log_softmax(logits, -1) + 1.7 * by_token, -1)
    assert torch.allclose(
        out.logprob.double(), exact.gather(1, out.token[:, None])[:, 0], atol=1e-5
    )


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_td_lambda_equals_the_forward_view(lam: float) -> None:
    """The recursion equals the mixture of n-step returns that defines it."""
    generator: Any = torch.Generator().manual_seed(0)
    values = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    rewards = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[0] * 2 + [1] * 7, [1] * 9, [1] * 4 + [0] * 5], dtype=torch.bool)
    gamma = 0.9
    targets = reference.td_lambda(values, rewards, mask, gamma, lam)
    for row in range(3):
        states = torch.nonzero(mask[row])[:, 0].tolist()
        end = states[-1]
        for t in states:
            returns = []
            for n in range(1, end - t + 1):
                total = sum(gamma**i * rewards[row, t + i] for i in range(n))
                returns.append(total + gamma**n * values[row, t + n])
            full = sum(gamma ** (i - t) * rewards[row, i] for i in range(t, end + 1))
            expected = lam ** len(returns) * full + sum(
                (1 - lam) * lam ** (n - 1) * r for n, r in enumerate(returns, start=1)
            )
            assert torch.allclose(targets[row, t], torch.as_tensor(expected, dtype=torch.float64))
        assert (targets[row, ~mask[row]] == 0).all()
