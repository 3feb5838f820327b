"""Laws of guided decoding, on the packaged model with real weights, fp32 on CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastguide import (
    ARGS,
    VAS,
    Completion,
    Engine,
    FunctionGuide,
    Plain,
    SamplingParams,
    ValueGuide,
)
from fastguide.config import Rule
from fastguide.models.value import ValueModel

PROMPTS = [
    "Once upon a time, there was a little dog named Max. Max loved to",
    "One day",
    "The sun was hot. Lily and her mom went to the beach to play in the sand. Then a big wave",
]


@pytest.fixture(scope="module")
def engine(stories: str, lora_guide: str, full_guide: str) -> Engine:
    guides = {"a": ValueGuide(lora_guide), "b": ValueGuide(full_guide)}
    return Engine(stories, guides=guides, dtype="float32")


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.8, "max_tokens": 24, "seed": 7} | changes))  # type: ignore[arg-type]


def ids(outputs: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in outputs]


@pytest.fixture(scope="module")
def recompute(stories: str, lora_guide: str) -> Callable[[list[int], Rule, int], list[int]]:
    """Greedy guided decoding with no cache: every continuation alone, through transformers."""
    policy = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    value = ValueModel.from_pretrained(lora_guide, dtype=torch.float32)

    @torch.inference_mode()
    def decode(prompt: list[int], rule: Rule, steps: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(steps):
            base = torch.log_softmax(policy(torch.tensor([tokens])).logits[0, -1].double(), -1)
            top = base.topk(rule.k)
            share = top.values.exp()
            needed = share.cumsum(0) - share < rule.candidate_mass
            top = (top.values[needed], top.indices[needed])
            scores = torch.stack(
                [value(torch.tensor([[*tokens, int(t)]]))[0, -1].double() for t in top[1]]
            )
            if isinstance(rule, VAS):  # other tokens keep their logits
                base[top[1]] += rule.beta * (scores - scores.mean())
                tokens.append(int(base.argmax()))
                continue
            if isinstance(rule, ARGS) and rule.form == "interpolated":
                total = (1 - rule.weight) * top[0] + rule.weight * scores
            else:
                total = top[0] + rule.weight * scores
            tokens.append(int(top[1][total.argmax()]))
        return tokens[len(prompt) :]

    return decode


@pytest.mark.parametrize(
    "rule",
    [
        VAS(6.0, 12),
        VAS(-6.0, 5),
        VAS(6.0, 12, candidate_mass=0.7),
        ARGS(4.0, 10),
        ARGS(0.8, 8, "interpolated"),
        ARGS(4.0, 10, candidate_mass=0.9),
    ],
    ids=lambda rule: repr(rule),
)
def test_greedy_tokens_equal_a_full_recompute_of_each_continuation(
    engine: Engine, recompute: Callable[[list[int], Rule, int], list[int]], rule: Rule
) -> None:
    found = engine.generate(
        PROMPTS, rule, {"a": 1.0}, params(temperature=0, max_tokens=16, ignore_eos=True)
    )
    plain = engine.generate(PROMPTS, sampling=params(temperature=0, max_tokens=16, ignore_eos=True))
    assert ids(found) != ids(plain)  # the guide does something here
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.token_ids == recompute(engine.tokenizer(prompt)["input_ids"], rule, 16)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_zero_weight_and_zero_beta_are_the_base_model(engine: Engine, temperature: float) -> None:
    sampling = params(temperature=temperature, n=3)
    plain = engine.generate(PROMPTS, sampling=sampling)
    for rule, weights in [
        (VAS(0.0, 20), None),
        (VAS(5.0, 7), {"a": 0.0}),
        (VAS(5.0, 9), {"a": 0.0, "b": 0.0}),
        (VAS(0.0, 3, "none"), {"b": 2.0}),
        (Plain(k=5), None),
    ]:
        guided = engine.generate(PROMPTS, rule, weights, sampling)
        assert ids(guided) == ids(plain)
        assert max(abs(kl) for c in guided for kl in c.kl) < 1e-5


def test_a_constant_score_is_the_identity(stories: str) -> None:
    engine = Engine(stories, guides={"c": FunctionGuide(lambda text: 2.5)}, dtype="float32")
    sampling = params(n=2)
    plain = engine.generate(PROMPTS, sampling=sampling)
    assert ids(engine.generate(PROMPTS, VAS(9.0), sampling=sampling)) == ids(plain)


def test_batched_equals_alone_and_neighbours_change_nothing(engine: Engine) -> None:
    """Different rules, temperatures and lengths in one batch; requests join and leave midway."""
    rules = [VAS(4.0, 20), ARGS(2.0, 10), None, VAS(-3.0, 5, "drop")]
    weights = [{"a": 1.0, "b": -0.5}, {"b": 1.0}, None, {"a": 1.0}]
    samplings = [
        params(max_tokens=9, n=3),
        params(temperature=1.2, max_tokens=24),
        params(temperature=0, max_tokens=15),
        params(max_tokens=20, seed=99),
    ]
    prompts = [*PROMPTS, "Tom saw a cat."]
    alone = [
        completion
        for prompt, rule, weight, sampling in zip(prompts, rules, weights, samplings, strict=True)
        for completion in engine.generate(prompt, rule, weight, sampling)
    ]
    together = engine.generate(prompts, rules, weights, samplings)
    assert ids(together) == ids(alone)
    assert [c.text for c in together] == [c.text for c in alone]
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(torch.tensor(one.kl), torch.tensor(other.kl), atol=1e-4)
    engine.max_rows = 2  # now they wait for each other
    try:
        assert ids(engine.generate(prompts, rules, weights, samplings)) == ids(alone)
    finally:
        engine.max_rows = 64


def test_samples_of_a_prompt_differ_and_do_not_depend_on_their_number(engine: Engine) -> None:
    four = engine.generate(PROMPTS[0], VAS(2.0), {"a": 1.0}, params(n=4))
    two = engine.generate(PROMPTS[0], VAS(2.0), {"a": 1.0}, params(n=2))
    assert ids(four)[:2] == ids(two)
    assert len({tuple(c.token_ids) for c in four}) == 4
    again = engine.generate(PROMPTS[0], VAS(2.0), {"a": 1.0}, params(seed=four[3].seed))
    assert ids(again) == ids(four)[3:]  # a completion's seed reproduces it


def test_streamed_equals_blocking(engine: Engine) -> None:
    sampling = params(n=2, max_tokens=40, stop=["play", "."])
    blocking = engine.generate(PROMPTS[0], VAS(3.0), {"a": 1.0}, sampling)
    texts, finals = {0: "", 1: ""}, {}
    for piece in engine.stream(PROMPTS[0], VAS(3.0), {"a": 1.0}, sampling):
        assert piece.sample not in finals
        texts[piece.sample] += piece.text
        if piece.completion:
            finals[piece.sample] = piece.completion
    for completion in blocking:
        assert texts[completion.sample] == completion.text == finals[completion.sample].text
        assert finals[completion.sample].token_ids == completion.token_ids
        assert "." not in completion.text


def test_reported_kl_and_log_probabilities_are_those_of_the_full_vocabulary(
    engine: Engine, stories: str, full_guide: str
) -> None:
    """Eq. 4 written over all V tokens, from transformers' own logits and values."""
    tau, rule = 0.8, VAS(beta=5.0, k=10)
    out = engine.generate(PROMPTS[2], rule, {"b": 1.0}, params(temperature=tau, max_tokens=12))[0]
    policy = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    value = ValueModel.from_pretrained(full_guide, dtype=torch.float32)
    tokens = list(engine.tokenizer(PROMPTS[2])["input_ids"])
    for i, token in enumerate(out.token_ids):
        with torch.inference_mode():
            logits = policy(torch.tensor([tokens])).logits[0, -1].double() / tau
            top = logits.topk(rule.k).indices
            scores = value(torch.tensor([[*tokens, int(t)] for t in top]))[:, -1].double()
        base = torch.log_softmax(logits, -1)
        values = torch.full_like(base, float(scores.mean())).scatter(0, top, scores)
        guided = torch.log_softmax(base + rule.beta * values, -1)
        assert out.kl[i] == pytest.approx(float((guided.exp() * (guided - base)).sum()), abs=2e-4)
        assert out.logprobs[i] == pytest.approx(float(guided[token]), abs=2e-3)
        assert out.base_logprobs[i] == pytest.approx(float(base[token]), abs=2e-3)
        where = (top == token).nonzero()
        if len(where):
            assert out.scores[i] == pytest.approx(float(scores[where[0, 0]]), abs=1e-4)
        else:
            assert out.scores[i] is None
        tokens.append(token)


def test_weights_compose_linearly(engine: Engine) -> None:
    """VAS section 3.3: the value of a weighted sum of rewards is the sum of the values."""
    sampling = params(max_tokens=1, temperature=0)
    one = engine.generate(PROMPTS, VAS(0.0), {"a": 1.0}, sampling)
    other = engine.generate(PROMPTS, VAS(0.0), {"b": 1.0}, sampling)
    both = engine.generate(PROMPTS, VAS(0.0), {"a": 2.0, "b": -0.5}, sampling)
    for x, y, z in zip(one, other, both, strict=True):
        assert z.scores[0] == pytest.approx(2 * x.scores[0] - 0.5 * y.scores[0], abs=1e-5)


def test_every_slot_comes_back(engine: Engine) -> None:
    engine.generate(PROMPTS, VAS(2.0), sampling=params(n=3))
    stream = engine.stream(PROMPTS[0], VAS(2.0), sampling=params())
    next(stream)
    stream.close()  # a reader that goes away
    decoders = [engine.runner.policy, *(s.decoder for s in engine.runner.scorers.values())]
    assert [d.pool.slots.in_use for d in decoders] == [0, 0, 0]


def test_memory_grows_by_k_scratch_slots_only(engine: Engine) -> None:
    """While a request runs, a guide holds its tokens and at most k scratch slots."""
    guide = engine.runner.scorers["b"].decoder
    prompt = engine.tokenizer(PROMPTS[0])["input_ids"]
    stream = engine.stream(PROMPTS[0], VAS(2.0, k=20), {"b": 1.0}, params(ignore_eos=True))
    held = []
    for _ in stream:
        held.append(guide.pool.slots.in_use)
    assert max(held) <= len(prompt) + 24 + 20
    stream = engine.stream(PROMPTS[0], VAS(2.0, k=20), {"b": 1.0}, params(n=4, max_tokens=2))
    next(stream)
    assert guide.pool.slots.in_use <= len(prompt) + 4 * (2 + 20)  # the prompt is held once
    stream.close()
