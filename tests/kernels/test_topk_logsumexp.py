"""``topk_logsumexp``: every implementation against its definition in fp64, on the same inputs."""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from fastguide.kernels import dispatch, native

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = [name for name in dispatch.IMPLEMENTATIONS if name != "auto"]

# Of the log-sum-exp in fp32, which rounds its result (6e-8 of it) and sums exponentials.
ATOL, RTOL = 1e-6, 2.5e-7


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("the native extension is not built")
    return str(request.param)


@pytest.fixture
def threads():
    """Sets the number of threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def definition(logits: Tensor, k: int, inv_temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the op means: z is an fp32 product; all that follows is exact."""
    z = (logits.float() * inv_temperature[:, None]).double()
    order = z.argsort(dim=-1, descending=True, stable=True)[:, :k]
    values = torch.full((z.shape[0], k), -INF)
    ids = torch.full((z.shape[0], k), -1, dtype=torch.int32)
    values[:, : order.shape[1]] = z.gather(-1, order).float()
    ids[:, : order.shape[1]] = order.int()
    return values, ids, torch.logsumexp(z, dim=-1)


def check(logits: Tensor, k: int, inv_temperature: Tensor, impl: str) -> None:
    values, ids, lse = dispatch.topk_logsumexp(logits, k, inv_temperature, impl=impl)
    true_values, true_ids, true_lse = definition(logits, k, inv_temperature)
    assert (values.dtype, lse.dtype) == (torch.float32, torch.float64)
    assert ids.dtype == torch.int32
    torch.testing.assert_close(values, true_values, rtol=0, atol=0)
    assert torch.equal(ids, true_ids)
    torch.testing.assert_close(lse.double(), true_lse, rtol=RTOL, atol=ATOL)


def draw(rows: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + vocab)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)


# --------------------------------------------------------------------------------- agreement

SIZES = [
    *product((0, 1, 3), (1, 2, 63, 64, 65, 1023, 1025, 5003), (1, 20, 256)),
    (64, 1001, 20),
    (3, 40_009, 20),
    (1, 40_009, 256),
    (1, 128_256, 20),
    (2, 300_007, 256),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab", "k"), SIZES)
def test_sizes(impl: str, rows: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    inv_temperature = torch.linspace(0.3, 3.0, rows)
    check(draw(rows, vocab, dtype), k, inv_temperature, impl)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("offset", [-1e3, 0.0, 1e3])
def test_scales(impl: str, scale: float, offset: float) -> None:
    logits = draw(3, 20_011, torch.float32, scale) + offset
    check(logits, 20, torch.tensor([0.01, 1.0, 10.0]), impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number(impl: str, dtype: torch.dtype) -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = words.view(dtype)
    numbers = numbers[~numbers.isnan() & (numbers != INF)][None]
    check(numbers, numbers.shape[1], torch.ones(1), impl)


@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_sorted_logits(impl: str, direction: int) -> None:
    logits = direction * torch.arange(50_000, dtype=torch.float32)[None] * 1e-3
    check(logits, 100, torch.ones(1), impl)


def test_ties_take_the_lower_id(impl: str) -> None:
    constant = torch.full((2, 40_000), 1.25)
    check(constant, 256, torch.tensor([1.0, 0.5]), impl)
    few_levels = torch.randint(-3, 3, (4, 40_000)).float()
    check(few_levels, 256, torch.ones(4), impl)


def test_negative_zero_ties_with_zero(impl: str) -> None:
    logits = torch.tensor([[-0.0, 0.0, -0.0, -1.0, 0.0]])
    _, ids, _ = dispatch.topk_logsumexp(logits, 4, torch.ones(1), impl=impl)
    assert ids.tolist() == [[0, 1, 2, 4]]


def test_values_that_only_tie_after_the_temperature(impl: str) -> None:
    logits = 1.9 + torch.arange(1000, dtype=torch.float32)[None] * 2**-23
    inv_temperature = torch.tensor([1.5])
    assert (logits * inv_temperature).unique().numel() < logits.unique().numel()
    check(logits, 100, inv_temperature, impl)


# ---------------------------------------------------------------------------- special numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity(impl: str, dtype: torch.dtype) -> None:
    logits = draw(4, 3000, dtype)
    logits[0] = -INF
    logits[1, 1:] = -INF
    logits[2, :2500] = -INF
    logits[3, ::2] = -INF
    check(logits, 600, torch.ones(4), impl)


def test_a_row_of_minus_infinity_has_lse_minus_infinity(impl: str) -> None:
    logits = torch.full((1, 70_000), -INF)
    values, ids, lse = dispatch.topk_logsumexp(logits, 3, torch.ones(1), impl=impl)
    assert lse.item() == -INF
    assert values.tolist() == [[-INF] * 3]
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("others", [0.0, 50.0, -INF])
@pytest.mark.parametrize("where", [0, 700, 69_999])
def test_a_nan_makes_lse_nan_in_its_row_only(impl: str, where: int, others: float) -> None:
    logits = torch.full((2, 70_000), others)
    logits[:, 5] = 1.0
    logits[0, where] = float("nan")
    _, _, lse = dispatch.topk_logsumexp(logits, 3, torch.ones(2), impl=impl)
    assert lse.isnan().tolist() == [True, False]


def test_padding_past_the_vocabulary(impl: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    values, ids, _ = dispatch.topk_logsumexp(logits, 5, torch.ones(1), impl=impl)
    assert values.tolist() == [[3.0, 2.0, 1.0, -INF, -INF]]
    assert ids.tolist() == [[1, 2, 0, -1, -1]]


# ------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(impl: str, dtype: torch.dtype) -> None:
    wide = draw(6, 5003, dtype)
    check(wide[:, :5000], 20, torch.ones(6), impl)
    check(wide[::2, 3:4000], 20, torch.ones(3), impl)
    check(wide[1:2, 7:].expand(3, -1), 20, torch.tensor([0.5, 1.0, 2.0]), impl)
    check(wide[:, 9:10], 20, torch.ones(6), impl)


def test_strided_temperatures(impl: str) -> None:
    check(draw(3, 1000, torch.float32), 20, torch.linspace(0.5, 2.0, 6)[::2], impl)


def test_neighbouring_rows_change_nothing(impl: str) -> None:
    logits = draw(7, 40_009, torch.float32)
    inv_temperature = torch.linspace(0.5, 2.0, 7)
    together = dispatch.topk_logsumexp(logits, 20, inv_temperature, impl=impl)
    alone = dispatch.topk_logsumexp(logits[4:5], 20, inv_temperature[4:5], impl=impl)
    for many, one in zip(together[:2], alone[:2], strict=True):
        assert torch.equal(many[4:5], one)
    torch.testing.assert_close(together[2][4:5], alone[2], rtol=RTOL, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_the_number_of_threads_changes_no_candidate(threads, rows: int) -> None:
    if not native.available():
        pytest.skip("the native extension is not built")
    logits, inv_temperature = draw(rows, 128_256, torch.bfloat16), torch.ones(rows)
    for count in (1, 2, 3, 8):
        threads(count)
        check(logits, 20, inv_temperature, "native")


# --------------------------------------------------------------------------------- properties


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_input(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4), label="rows")
    vocab = data.draw(st.integers(1, 2500), label="vocab")
    k = data.draw(st.integers(1, 300), label="k")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    levels = data.draw(st.sampled_from([1, 3, 100, 2**20]), label="levels")
    scale = data.draw(st.floats(1e-3, 100.0), label="scale")
    gaps = data.draw(st.sampled_from([0.0, 0.1, 0.99]), label="share of -inf")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    logits = torch.randint(-levels, levels + 1, (rows, vocab), generator=generator).float()
    logits = logits * (scale / levels)
    logits[torch.rand(rows, vocab, generator=generator) < gaps] = -INF
    inv_temperature = torch.rand(rows, generator=generator) * 4 + 0.01
    for impl in IMPLEMENTATIONS:
        if impl != "native" or native.available():
            check(logits.to(dtype), k, inv_temperature, impl)


# ----------------------------------------------------------------------------------- dispatch


def test_native_is_built_where_it_is_required() -> None:
    if os.environ.get("FASTGUIDE_REQUIRE_NATIVE", "") in ("", "0"):
        pytest.skip("FASTGUIDE_REQUIRE_NATIVE is not set")
    assert native.available()


def test_auto_prefers_native_and_falls_back_visibly() -> None:
    contiguous = torch.zeros(2, 10)
    expected = "native" if native.available() else "reference"
    assert dispatch.chosen(contiguous) == expected
    assert dispatch.chosen(contiguous.double()) == "reference"
    assert dispatch.chosen(torch.zeros(10, 2).T) == "reference"
    assert dispatch.chosen(contiguous.requires_grad_()) == "reference"
    with torch.no_grad():
        assert dispatch.chosen(contiguous) == expected


def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_C", None)
    logits = torch.zeros(1, 4)
    assert dispatch.chosen(logits) == "reference"
    dispatch.topk_logsumexp(logits, 1, torch.ones(1))
    with pytest.raises(ValueError, match=r"not built.*FASTGUIDE_REQUIRE_NATIVE=1 pip install"):
        dispatch.topk_logsumexp(logits, 1, torch.ones(1), impl="native")


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (torch.zeros(1, 4, dtype=torch.float64), "float32, bfloat16, float16, not float64"),
        (torch.zeros(4, 2).T, "stride of 1 along the vocabulary, not 2"),
        (torch.zeros(1, 4, requires_grad=True), "no gradient"),
        (torch.zeros(1, 4, device="meta"), "CPU tensors, not meta"),
    ],
)
def test_a_forced_implementation_never_falls_back(logits: Tensor, reason: str) -> None:
    if not native.available():
        pytest.skip("the native extension is not built")
    ones = torch.ones(logits.shape[0], device=logits.device)
    with pytest.raises(ValueError, match=reason):
        dispatch.topk_logsumexp(logits, 1, ones, impl="native")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4), 1, torch.ones(1)), r"logits must be \[N, V\].*not \[4\]"),
        ((torch.zeros(1, 0), 1, torch.ones(1)), r"V at least 1, not \[1, 0\]"),
        ((torch.zeros(1, 4).long(), 1, torch.ones(1)), "not torch.int64"),
        ((torch.zeros(1, 4), 0, torch.ones(1)), "k must be at least 1, not 0"),
        ((torch.zeros(2, 4), 1, torch.ones(1)), r"must be \[2\].*not \[1\]"),
        ((torch.zeros(1, 4), 1, torch.ones(1).double()), "must be float32, not torch.float64"),
        ((torch.zeros(1, 4), 1, torch.ones(1, device="meta")), "must be on .* cpu, not meta"),
        ((torch.zeros(1, 4), 1, torch.ones(1), "fast"), "auto, reference, native, not 'fast'"),
    ],
)
def test_wrong_input_gets_one_sentence(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dispatch.topk_logsumexp(*arguments)


@pytest.mark.parametrize("factor", [0.0, -1.0, INF, float("nan")])
def test_native_temperatures_must_be_positive_and_finite(factor: float) -> None:
    if not native.available():
        pytest.skip("the native extension is not built")
    with pytest.raises(ValueError, match=r"positive and finite, not .*\(row 1\)"):
        native.topk_logsumexp(torch.zeros(2, 4), 1, torch.tensor([1.0, factor]))
