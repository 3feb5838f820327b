"""Packed weights and native stacks compute what the model's own layers do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import CASES, assert_close, recompute, tiny_model, tokens

from fastguide.kernels import native
from fastguide.kernels.packed import PackedWeight
from fastguide.models.decoder import Decoder
from fastguide.models.packing import PackedLinear

pytestmark = pytest.mark.skipif(not native.available(), reason="the extension is not built")

STACKED = {c for c in CASES if CASES[c][0] in ("llama", "mistral", "qwen2", "qwen3")}


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(768, 300), (100, 33), (1, 7), (64, 1), (129, 65)])
@pytest.mark.parametrize("rows", [0, 1, 5, 13, 200])
def test_packed_weight_is_a_linear_layer(
    isa: str, dtype: torch.dtype, outputs: int, inputs: int, rows: int
) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    x = torch.randn(rows, inputs).to(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    with native.instruction_set(isa):
        found = PackedWeight(weight, bias)(x)
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    # The bound of a sum in fp32, and that of rounding it once.
    size = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    allowed = torch.finfo(torch.float32).eps * inputs * size + torch.finfo(dtype).eps * exact.abs()
    assert ((found - exact).abs() <= allowed + 1e-30).all()


def test_weights_of_any_stride_and_inputs_of_any_rank() -> None:
    weight = torch.randn(70, 2 * 40)[:, ::2]
    x = torch.randn(2, 3, 40).transpose(0, 1)
    torch.testing.assert_close(PackedWeight(weight)(x), F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    packed, x = PackedWeight(torch.randn(130, 96).bfloat16()), torch.randn(101, 96).bfloat16()
    whole = packed(x)
    for start, end in ((0, 1), (3, 8), (95, 101)):
        assert torch.equal(packed(x[start:end]), whole[start:end])


@pytest.mark.parametrize("case", CASES)
def test_packed_model_equals_full_recompute(case: str) -> None:
    """Ragged prompts and branches, and a second pass on what the first one cached."""
    model = tiny_model(case)
    decoder = Decoder(model, context=128)
    prompts = [tokens(1, 23), tokens(2, 5), tokens(3, 14)]
    branches = [[(4,), (9,), (0,)], [(7, 8, 9), (7,)], [(1, 2)]]
    rows = [[*p, *b] for p, own in zip(prompts, branches, strict=True) for b in own]
    expected = recompute(model, rows)
    longer = recompute(model, [[*p, *own[0], 5] for p, own in zip(prompts, branches, strict=True)])
    weights, head = decoder.weights, model.get_output_embeddings().weight.numel()
    decoder.pack()
    assert (decoder.weights, decoder.body_weights) == (weights, weights - head)
    assert decoder.stacked == (case in STACKED)
    sequences = [decoder.open(prompt) for prompt in prompts]
    assert_close(decoder.run(sequences, branches), expected)
    for sequence, own in zip(sequences, branches, strict=True):
        sequence.append(*own[0])
        sequence.append(5)
    assert_close(decoder.run(sequences), longer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_model_is_as_exact_as_the_model(dtype: torch.dtype) -> None:
    """Rounding less often, its error is at most that of the model's own layers in this dtype."""
    rows = [tokens(4, 30)]
    exact = recompute(tiny_model("llama").double(), rows)
    low = tiny_model("llama", dtype)
    expected = recompute(low, rows)
    decoder = Decoder(low)
    decoder.pack()
    found = decoder.run([decoder.open(rows[0])])
    assert found.dtype == dtype
    assert (found - exact).norm() <= 1.2 * (expected - exact).norm()


def test_packed_layers_free_the_weights(stories: str) -> None:
    from fastguide.models.loading import load_policy

    decoder = load_policy(stories)
    before = sum(p.numel() for p in decoder.model.parameters())
    decoder.pack()
    after = sum(p.numel() for p in decoder.model.parameters())
    assert any(isinstance(m, PackedLinear) for m in decoder.model.modules())
    assert after < before / 2
