"""``model.generate`` with the processor equals the engine, and samples eq. 4 exactly."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastguide import ARGS, VAS, Engine, FunctionGuide, Plain, SamplingParams, ValueGuide
from fastguide.config import Rule
from fastguide.integrations.transformers import GuidedLogitsProcessor

PROMPTS = ["Once upon a time, there was a little dog named Max.", "One day", "Tom and Lily ran"]


@pytest.fixture(scope="module")
def policy(stories: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()


def processor(
    guide: str, stories: str, rule: Rule, temperature: float, mask: torch.Tensor | None = None
) -> GuidedLogitsProcessor:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    return GuidedLogitsProcessor(
        {"g": ValueGuide(guide)}, rule, {"g": 1.5}, tokenizer=tokenizer, temperature=temperature,
        attention_mask=mask, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(
    "rule", [VAS(5.0, 12), ARGS(2.0, 8), ARGS(0.7, 8, "interpolated")], ids=repr
)
def test_greedy_batched_and_left_padded_equals_the_engine(
    policy: torch.nn.Module, stories: str, lora_guide: str, rule: Rule
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories, padding_side="left")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    guided = processor(lora_guide, stories, rule, 0.0, batch["attention_mask"])
    out = policy.generate(
        **batch, do_sample=False, max_new_tokens=20, eos_token_id=None, logits_processor=[guided]
    )
    engine = Engine(stories, guides={"g": ValueGuide(lora_guide)}, dtype="float32")
    expected = engine.generate(
        PROMPTS, rule, {"g": 1.5}, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    )
    width = batch["input_ids"].shape[1]
    assert out[:, width:].tolist() == [c.token_ids for c in expected]
    # A second call, with other prompts, on the same processor.
    guided.reset()
    one = tokenizer(PROMPTS[2], return_tensors="pt")
    out = policy.generate(
        **one, do_sample=False, max_new_tokens=20, eos_token_id=None, logits_processor=[guided]
    )
    assert out[0, one["input_ids"].shape[1] :].tolist() == expected[2].token_ids


@pytest.mark.parametrize(
    "rule", [VAS(4.0, 10), VAS(4.0, 10, "none"), VAS(-4.0, 10, "drop"), ARGS(2.0, 6), VAS(0.0, 5)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_what_the_host_samples_from_is_the_guided_distribution(
    policy: torch.nn.Module, stories: str, lora_guide: str, rule: Rule, temperature: float
) -> None:
    """The host divides by its temperature afterwards: exactly the engine's distribution remains."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokens = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = policy(tokens).logits[:, -1]
        guided = processor(lora_guide, stories, rule, temperature)(tokens, logits)
    host = torch.log_softmax(guided.double() / temperature, -1)[0]
    engine = Engine(stories, guides={"g": ValueGuide(lora_guide)}, dtype="float32")
    out = engine.generate(
        [tokens[0].tolist()], rule, {"g": 1.5},
        SamplingParams(temperature=temperature, max_tokens=1, seed=5, n=32),
    )  # fmt: skip
    base = torch.log_softmax(logits.double() / temperature, -1)[0]
    finite = torch.isfinite(host)
    kl = float((host.exp() * (host - base))[finite].sum())
    for completion in out:
        assert completion.logprobs[0] == pytest.approx(
            float(host[completion.token_ids[0]]), abs=1e-3
        )
        assert completion.kl[0] == pytest.approx(kl, abs=1e-3)


def test_sampling_and_beams_run(policy: torch.nn.Module, stories: str, lora_guide: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories, padding_side="left")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    for settings in (
        dict(do_sample=True, temperature=0.7, num_return_sequences=2),
        dict(do_sample=False, num_beams=3),
    ):
        torch.manual_seed(0)
        temperature = float(settings.get("temperature", 0.0))
        guided = processor(lora_guide, stories, VAS(3.0, 8), temperature, batch["attention_mask"])
        out = policy.generate(**batch, **settings, max_new_tokens=8, logits_processor=[guided])
        assert out.shape[0] == 3 * int(settings.get("num_return_sequences", 1))
        guided.reset()
        assert guided.scorers["g"].decoder.pool.slots.in_use == 0


def test_unknown_names_and_plain_rules(stories: str, lora_guide: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    with pytest.raises(ValueError, match="unknown guide 'x'; allowed are g"):
        GuidedLogitsProcessor({"g": ValueGuide(lora_guide)}, VAS(), {"x": 1.0}, tokenizer=tokenizer)
    logits = torch.randn(1, 2048)
    same = processor(lora_guide, stories, Plain(), 0.0)(torch.tensor([[0, 5]]), logits)
    assert torch.allclose(same, logits)


def test_scores_that_are_not_finite_name_guide_and_row(stories: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)

    def score(tokens: list[int]) -> float:
        return float("nan") if tokens[0] == 9 else 0.0

    guided = GuidedLogitsProcessor(
        {"odd": FunctionGuide(score, on="tokens")}, VAS(k=3), tokenizer=tokenizer
    )
    with pytest.raises(ValueError, match="guide 'odd' gave scores that are not finite for row 1"):
        guided(torch.tensor([[5, 6], [9, 6]]), torch.randn(2, 2048))
    with pytest.raises(ValueError, match=r"k is 3; allowed are 1 to 2 \(vocabulary\)"):
        guided(torch.tensor([[5, 6]]), torch.randn(1, 2))


def test_a_rule_without_weights_still_drops(stories: str) -> None:
    """ARGS forbids all but its candidates, whatever the guides weigh; as in the engine."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    guided = GuidedLogitsProcessor({}, ARGS(k=3), tokenizer=tokenizer)
    logits = torch.randn(2, 2048)
    found = guided(torch.tensor([[5, 6], [9, 6]]), logits)
    kept = torch.isfinite(found)
    assert torch.equal(kept.sum(-1), torch.tensor([3, 3]))
    assert torch.allclose(found[kept], logits[kept])
