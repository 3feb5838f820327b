"""The sampling step: every implementation against its definition over the full vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare
from steps import (
    RULES,
    VOCAB,
    definition,
    few,
    logits_of,
    lowered,
    reference_impl,
    run,
    scores_of,
)

from fastguide.config import ARGS, FUDGE, VAS, Plain, Rule
from fastguide.kernels import guide_sample, reference, topk_logsumexp


@pytest.mark.parametrize(("rule", "temperature"), RULES)
def test_log_probabilities_and_kl_are_those_of_the_definition(
    impl: Any, rule: Rule, temperature: float
) -> None:
    rows = few(impl, 64)
    logits, scores = logits_of(rows), scores_of(rows, rule.k)
    out, _ = run(impl, logits, scores, rule, temperature, torch.arange(rows))
    guided = definition(logits, scores, rule, temperature)
    base = torch.log_softmax(logits.double() / temperature, dim=-1)
    kl = (guided.exp() * torch.where(guided.isinf(), 0.0, guided - base)).sum(-1)
    picked = out.token[:, None]
    near = {"rtol": 1e-5, "atol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(out.kl, kl, **near)
    torch.testing.assert_close(out.logprob, guided.gather(1, picked)[:, 0], **near)
    torch.testing.assert_close(out.base_logprob, base.gather(1, picked)[:, 0], **near)
    inside = out.source >= 0
    own = scores.gather(1, out.source.clamp_min(0)[:, None])[:, 0]
    own = torch.nn.functional.logsigmoid(own) if isinstance(rule, FUDGE) else own
    torch.testing.assert_close(out.score[inside], own[inside], rtol=1e-6, atol=0)
    assert out.score[~inside].isnan().all()


@pytest.mark.parametrize(("rule", "temperature"), RULES)
def test_sampled_frequencies_match_the_definition(
    impl: Any, rule: Rule, temperature: float
) -> None:
    """χ² of 100,000 draws, the tail included; unscored and forbidden tokens never appear."""
    if impl.interpreted:
        pytest.skip("too many draws for Triton's interpreter; it must draw the reference's tokens")
    draws = 100_000
    logits, scores = logits_of(1), scores_of(1, rule.k)
    expected = definition(logits, scores, rule, temperature).exp()[0] * draws
    out, _ = run(
        impl,
        logits.expand(draws, -1),
        scores.expand(draws, -1),
        rule,
        temperature,
        torch.arange(draws),
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


def test_every_implementation_draws_the_references_tokens(impl: Any) -> None:
    rows = few(impl, 4000)
    rules = [RULES[i % len(RULES)] for i in range(rows)]
    rules = [(rule, 0.0 if i % 5 == 0 else t) for i, (rule, t) in enumerate(rules)]
    logits, seeds = logits_of(rows, 300, 3.0), torch.arange(rows) * 2**40 - 2**50
    scores = scores_of(rows, max(rule.k for rule, _ in rules))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        step = (logits.to(dtype), scores, rules, 1.0, seeds, 2**32 - 5)
        found, _ = run(impl, *step, top=reference_impl)
        wanted, _ = run(reference_impl, *step)
        assert torch.equal(found.token, wanted.token)
        assert torch.equal(found.source, wanted.source)
        for name in ("score", "logprob", "base_logprob", "kl"):
            one, other = getattr(found, name), getattr(wanted, name)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


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
    impl: Any, top: list[float], scores: list[float], rule: VAS
) -> None:
    """fp32 logits, a tail of next to no mass, and a guide that rules the likely tokens out."""
    rows, vocab = few(impl, 20_000), 40 if rule.k == 20 else 3
    logits = torch.tensor([*top, *[-30.0] * (vocab - len(top))]).expand(rows, -1).contiguous()
    given = torch.tensor(scores).expand(rows, -1)
    out, _ = run(impl, logits, given, rule, 1.0, torch.arange(rows))
    guided = definition(logits[:1], torch.tensor([scores]), rule, 1.0)
    base = torch.log_softmax(logits[:1].double(), -1)
    kl = float((guided.exp() * (guided - base)).sum())
    assert out.kl[0].item() == pytest.approx(kl, rel=1e-4)
    inside = guided[0, : rule.k].exp().sum()
    if inside > 1 - 1e-9:
        assert (out.source >= 0).all()
    if rows > 10_000:
        counts = torch.bincount(out.token[out.source >= 0], minlength=vocab) / rows
        assert torch.allclose(counts.double()[: rule.k], guided[0, : rule.k].exp(), atol=0.02)


def test_zero_weight_draws_the_base_models_token_whatever_k_is(impl: Any) -> None:
    rows = few(impl, 5000)
    logits, seeds = logits_of(rows), torch.arange(rows)
    plain, _ = run(impl, logits, scores_of(rows, 1), Plain(k=1), 0.9, seeds)
    for rule in (VAS(0.0, 3), VAS(0.0, 20), VAS(0.0, 7, "none"), VAS(0.0, VOCAB), Plain(k=11)):
        guided, _ = run(impl, logits, scores_of(rows, rule.k), rule, 0.9, seeds)
        assert torch.equal(guided.token, plain.token), rule
        assert guided.kl.abs().max() < 1e-6


def test_a_constant_score_is_the_identity(impl: Any) -> None:
    rows = few(impl, 2000)
    logits, seeds = logits_of(rows), torch.arange(rows)
    plain, _ = run(impl, logits, scores_of(rows, 1), Plain(20), 0.8, seeds)
    constant = torch.full((rows, 9), 3.7)
    guided, _ = run(impl, logits, constant, VAS(beta=5.0, k=9), 0.8, seeds)
    assert torch.equal(guided.token, plain.token)
    assert guided.kl.abs().max() < 1e-6


def test_a_shift_of_all_scores_changes_nothing_with_mean_fill(impl: Any) -> None:
    rows = few(impl, 2000)
    logits, scores, seeds = logits_of(rows), scores_of(rows, 9), torch.arange(rows)
    one, _ = run(impl, logits, scores, VAS(beta=2.0, k=9), 0.8, seeds)
    two, _ = run(impl, logits, scores + 100.0, VAS(beta=2.0, k=9), 0.8, seeds)
    assert torch.equal(one.token, two.token)


@pytest.mark.parametrize(
    "rule",
    [VAS(2.0, 6), VAS(-2.0, 6), VAS(-50.0, 2, "none"), VAS(2.0, 6, "drop"), ARGS(1.5, 6), Plain(4)],
)
def test_greedy_takes_the_mode(impl: Any, rule: Rule) -> None:
    rows = few(impl, 500)
    logits, scores = logits_of(rows), scores_of(rows, rule.k)
    out, _ = run(impl, logits, scores, rule, 0.0, torch.arange(rows))
    guided = definition(logits, scores, rule, 0.0)
    assert torch.equal(out.token, guided.argmax(-1))
    assert torch.allclose(out.logprob.double(), guided.max(-1).values, atol=1e-5)
    if rule == VAS(-50.0, 2, "none"):
        assert (out.source == reference.TAIL).any()  # the case this rule is here for


def test_rows_with_different_parameters_do_not_touch_each_other(impl: Any) -> None:
    rules: list[tuple[Rule, float]] = [(VAS(2.0, 3), 0.7), (ARGS(1.0, 6), 1.0), (Plain(2), 1.3)]
    logits, scores, seeds = logits_of(3), scores_of(3, 7), torch.tensor([5, 6, 7])
    together, _ = run(impl, logits, scores, rules, 1.0, seeds)
    for i, (rule, temperature) in enumerate(rules):
        row = slice(i, i + 1)
        alone, _ = run(impl, logits[row], scores[row], rule, temperature, seeds[row])
        assert together.token[i] == alone.token[0]
        for name in ("score", "logprob", "base_logprob", "kl"):
            one, other = getattr(together, name)[i], getattr(alone, name)[0]
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_several_guides_are_composed_and_a_guide_of_weight_0_is_not_read(impl: Any) -> None:
    rows, k, vocab = 5, 6, VOCAB
    logits, ones = logits_of(rows), torch.ones(rows)
    values, ids, lse = impl(topk_logsumexp, logits, k + 1, ones)
    given = torch.stack(
        [scores_of(rows, k + 1), scores_of(rows, k + 2)[:, 1:], scores_of(1, 1).expand(rows, k + 1)]
    )
    given[2] = float("nan")
    given[1, 3] = float("inf")
    weights = torch.tensor([[1.0, 0.5, -2.0, 1.0, 0.0], [0.0, 1.0, 3.0, 0.0, 0.0], [0.0] * 5])
    for rule in (VAS(2.0, k), FUDGE(1.0, k)):
        row = lowered([(rule, 1.0)] * rows) | {
            "seed": torch.arange(rows),
            "position": torch.zeros(rows, dtype=torch.int64),
        }
        out = impl(guide_sample, logits, ones, values, ids, lse, given, weights.double(), **row)
        each = torch.nn.functional.logsigmoid(given) if isinstance(rule, FUDGE) else given
        composed = torch.nan_to_num(each * (weights != 0)[:, :, None], nan=0.0, posinf=0.0)
        composed = (composed * weights[:, :, None]).sum(0)
        as_vas = VAS(1.0, k, "drop") if isinstance(rule, FUDGE) else rule
        guided = definition(logits, composed, as_vas, 1.0)
        found = guided.gather(1, out.token[:, None])[:, 0]
        torch.testing.assert_close(out.logprob.double(), found, rtol=1e-5, atol=2e-6)
    assert vocab == logits.shape[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_whose_numbers_are_not_finite_has_no_token_and_harms_no_other(
    impl: Any, bad: float
) -> None:
    logits, scores, seeds = logits_of(4), scores_of(4, 6), torch.arange(4)
    well, _ = run(impl, logits, scores, VAS(2.0, 6), 1.0, seeds)
    scores[1, 2] = bad
    if bad != float("-inf"):  # which is a token that cannot be
        logits[2, 5] = bad
    out, _ = run(impl, logits, scores, VAS(2.0, 6), 1.0, seeds)
    hurt = [1] if bad == float("-inf") else [1, 2]
    for row in range(4):
        if row not in hurt:
            assert out.token[row] == well.token[row]
            continue
        assert (out.token[row], out.source[row]) == (-1, reference.TAIL)
        assert all(column[row].isnan() for column in out[2:])


def test_impossible_tokens_are_never_drawn(impl: Any) -> None:
    rows = few(impl, 4000)
    logits = torch.full((rows, VOCAB), float("-inf"))
    logits[:, [3, 17]] = torch.tensor([0.3, 0.1])
    for rule in (VAS(2.0, 1), VAS(2.0, 2), VAS(2.0, 8), ARGS(1.0, 8), Plain(5)):
        out, _ = run(impl, logits, scores_of(rows, rule.k), rule, 1.0, torch.arange(rows))
        assert set(out.token.tolist()) <= {3, 17}, rule
        assert torch.isfinite(out.kl).all()


def test_extreme_weights_stay_finite(impl: Any) -> None:
    rows = few(impl, 50)
    logits, scores = logits_of(rows), scores_of(rows, 6) * 1e4
    for rule in (VAS(1e4, 6), VAS(-1e4, 6), ARGS(1e4, 6)):
        out, _ = run(impl, logits, scores, rule, 1.0, torch.arange(rows))
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


def test_empty_batches(impl: Any) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    out, _ = run(impl, logits_of(0), scores_of(0, 4), VAS(1.0, 4), 1.0, nothing)
    assert all(field.shape == (0,) for field in out)


def test_any_step(impl: Any) -> None:
    """Tokens and numbers of any step are the reference's."""

    @settings(max_examples=impl.size(40, 10), deadline=None)
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        rows = data.draw(st.integers(1, 4), label="rows")
        vocab = data.draw(st.integers(1, 600), label="vocab")
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
        scale = data.draw(st.sampled_from([0.0, 0.1, 3.0, 40.0]), label="scale")
        logits = torch.randn(rows, vocab, generator=generator) * scale
        gaps = data.draw(st.sampled_from([0.0, 0.5, 0.99]), label="share of -inf")
        logits[torch.rand(logits.shape, generator=generator) < gaps] = float("-inf")
        logits[:, vocab // 2] = 0.5
        k = data.draw(st.integers(1, min(vocab, 256)), label="k")
        strength = data.draw(st.sampled_from([-30.0, 0.0, 1.0, 8.0]), label="strength")
        rule = data.draw(
            st.sampled_from(
                [VAS(strength, k), VAS(strength, k, "none"), ARGS(strength, k), FUDGE(1.0, k)]
            ),
            label="rule",
        )
        temperature = data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.0]), label="temperature")
        seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
        scores = torch.randn(rows, k, generator=generator)
        found, _ = run(impl, logits, scores, rule, temperature, seeds)
        wanted, _ = run(reference_impl, logits, scores, rule, temperature, seeds)
        assert torch.equal(found.token, wanted.token)
        for name in ("score", "logprob", "base_logprob", "kl"):
            one, other = getattr(found, name), getattr(wanted, name)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)

    holds()


def test_k_equal_to_the_vocabulary_is_full_vocabulary_vas(impl: Any) -> None:
    """Eq. 2 over the whole vocabulary, with no approximation left."""
    logits, scores = logits_of(32), scores_of(32, VOCAB)
    out, read = run(impl, logits, scores, VAS(beta=1.7, k=VOCAB), 1.0, torch.arange(32))
    by_token = torch.zeros_like(logits).scatter(1, read["ids"].long(), scores).double()
    exact = torch.log_softmax(torch.log_softmax(logits.double(), -1) + 1.7 * by_token, -1)
    assert torch.allclose(
        out.logprob.double(), exact.gather(1, out.token[:, None])[:, 0], atol=1e-5
    )
