"""Compiled norms and MLPs compute what they did before."""

from __future__ import annotations

import pytest
import torch
from architectures import assert_close, recompute, tiny_model, tokens

from fastguide import VAS, Engine, SamplingParams, ValueGuide
from fastguide.models.decoder import Decoder
from fastguide.models.fusing import fuse


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "parts"), [("llama", 3 * 3 + 1), ("gpt2", 3 * 3 + 1), ("gemma3_text", 3 * 5 + 1)]
)
def test_a_fused_model_equals_full_recompute(case: str, parts: int) -> None:
    """With one row, with several, and with another number of them."""
    torch.compiler.reset()
    whole, model = tiny_model(case), tiny_model(case)
    names = list(model.state_dict())
    assert fuse(model) == parts
    assert list(model.state_dict()) == names
    decoder = Decoder(model, context=128)
    sequence = decoder.open(tokens(1, 23))
    for branches in ([(4,)], [(7, 8, 9), (7,)], [(4,), (9,), (0,), (3,), (2,)]):
        found = decoder.run([sequence], [branches])
        assert_close(found, recompute(whole, [[*sequence.tokens, *b] for b in branches]))
        sequence.append(*branches[-1])
    sequence.append(11)
    assert_close(decoder.run([sequence]), recompute(whole, [sequence.tokens]))


@pytest.mark.slow
def test_an_engine_that_compiles(
    stories: str, lora_guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters on compiled layers; a native stack, which has no use for it, is done without."""
    torch.compiler.reset()
    monkeypatch.setattr("fastguide.models.decoder.stack_of", lambda model: None)
    monkeypatch.setattr("fastguide.models.decoder.pack_linears", lambda model: None)
    found = []
    for compiled in (False, True):
        engine = Engine(
            stories, {"g": ValueGuide(lora_guide)}, dtype="float32", device="cpu", compile=compiled
        )
        forwards = [layer.mlp.forward for layer in engine.runner.policy.model.model.layers]
        assert all(hasattr(f, "_torchdynamo_orig_callable") == compiled for f in forwards)
        sampling = SamplingParams(0.8, 8, seed=2, n=2)
        found.append(engine.generate(["Once upon a time", "The dog"], VAS(4.0, 6), None, sampling))
    assert [c.token_ids for c in found[0]] == [c.token_ids for c in found[1]]
