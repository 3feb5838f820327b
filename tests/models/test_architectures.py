"""Every verified model type agrees with a full recompute by its own attention."""

from __future__ import annotations

import pytest
import torch
from architectures import CASES, assert_close, recompute, tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder
from fastguide.models.support import VERIFIED, check_config, check_model


def test_every_verified_type_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == VERIFIED


@pytest.mark.parametrize("case", CASES)
def test_tree_pass_equals_full_recompute(case: str) -> None:
    """Ragged prompts, single tokens and longer branches, twice, with commits in between."""
    model = tiny_model(case)
    check_config(model.config)
    check_model(model)
    decoder = Decoder(model, context=128)
    prompts = [tokens(1, 23), tokens(2, 5), tokens(3, 14)]
    branches = [[(4,), (9,), (0,)], [(7, 8, 9), (7,)], [(1, 2)]]
    sequences = [decoder.open(prompt) for prompt in prompts]
    for _ in range(3):
        found = decoder.run(sequences, branches)
        rows = [[*s.tokens, *b] for s, own in zip(sequences, branches, strict=True) for b in own]
        assert_close(found, recompute(model, rows))
        for sequence, own in zip(sequences, branches, strict=True):
            sequence.append(*own[0])
    sequences[0].append(3)  # a token that was never scored, as a draw from the tail
    sequences[1].append(5, 6)
    found = decoder.run(sequences, branches)
    rows = [[*s.tokens, *b] for s, own in zip(sequences, branches, strict=True) for b in own]
    assert_close(found, recompute(model, rows))
    for sequence in sequences:
        sequence.close()
    assert decoder.pool.slots.in_use == 0


@pytest.mark.parametrize("case", ["llama", "mistral-window", "gemma3_text", "opt"])
def test_chunked_prefill_equals_full_recompute(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastguide.models.decoder.PREFILL_CHUNK", 7)
    monkeypatch.setattr("fastguide.models.decoder.PASS_TOKENS", 10)
    model = tiny_model(case)
    decoder = Decoder(model)
    prompts = [tokens(4, 40), tokens(5, 3), tokens(6, 18)]
    found = decoder.run([decoder.open(p) for p in prompts])
    assert_close(found, recompute(model, prompts))
    sequences = [decoder.open(p) for p in prompts]
    decoder.prefill(sequences, keep=1)
    assert [len(s.pending) for s in sequences] == [1, 1, 1]
    assert_close(decoder.run(sequences), recompute(model, prompts))


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3_text"])
def test_forks_share_slots_and_agree(case: str) -> None:
    model = tiny_model(case)
    decoder = Decoder(model)
    first = decoder.open(tokens(1, 20))
    decoder.prefill([first])
    twins = [first, first.fork(), first.fork()]
    assert decoder.pool.slots.in_use == 20
    for i, twin in enumerate(twins):
        twin.append(i + 1)
    found = decoder.run(twins)
    assert decoder.pool.slots.in_use == 23
    assert_close(found, recompute(model, [t.tokens for t in twins]))
    first.close()
    assert decoder.pool.slots.in_use == 22
    twins[1].append(9)
    assert_close(decoder.run([twins[1]]), recompute(model, [twins[1].tokens]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama", "gemma3_text", "gpt2"])
def test_low_precision_error_is_that_of_the_models_own_attention(
    case: str, dtype: torch.dtype
) -> None:
    """At most twice the error of the same-precision eager run, both against fp32."""
    exact = tiny_model(case).to(dtype).float()
    low = tiny_model(case, dtype)
    rows = [[*tokens(1, 23), b] for b in (4, 9, 0)]
    truth = recompute(exact, rows)
    own = (recompute(low, rows).float() - truth).norm()
    decoder = Decoder(low)
    found = decoder.run([decoder.open(tokens(1, 23))], [[(4,), (9,), (0,)]]).float()
    assert (found - truth).norm() <= 2 * own


def test_a_failing_pass_gives_its_slots_back() -> None:
    decoder = Decoder(tiny_model("llama"))
    sequence = decoder.open([1, 2, 3])
    decoder.run([sequence], [[(4,)]])
    held = decoder.pool.slots.in_use
    sequence.append(10_000)  # outside the vocabulary
    with pytest.raises(IndexError):
        decoder.run([sequence])
    assert decoder.pool.slots.in_use == held - 1  # the branch that was not taken
    sequence.truncate(3)
    sequence.append(4)
    assert_close(decoder.run([sequence]), recompute(decoder.model, [[1, 2, 3, 4]]))


def test_a_multimodal_model_as_a_text_decoder() -> None:
    """Gemma-3 checkpoints from 4B up load as image-text models; their text path is guided."""
    _, text = CASES["gemma3_text"]
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    check_config(model.config)
    check_model(model)
    decoder, prompt = Decoder(model), tokens(1, 23)
    found = decoder.run([decoder.open(prompt)], [[(4,), (9,)]])
    assert_close(found, recompute(model, [[*prompt, 4], [*prompt, 9]]))
