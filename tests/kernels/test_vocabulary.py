"""``topk_logsumexp`` and ``sample_tail``: every implementation against a definition in fp64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from fastguide.kernels import sample_tail, topk_logsumexp, tuning

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of a log-sum-exp that sums exponentials in fp32 (each to 2e-7).
ATOL, RTOL = 1e-6, 2.5e-7


@pytest.fixture
def threads():
    """Sets the number of threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def definition(logits: Tensor, k: int, inv_temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the op means: z is an fp32 product; all that follows is exact."""
    z = (logits.float() * inv_temperature[:, None]).double()
    order = logits.double().argsort(dim=-1, descending=True, stable=True)[:, :k]
    values = torch.full((z.shape[0], k), -INF)
    ids = torch.full((z.shape[0], k), -1, dtype=torch.int32)
    values[:, : order.shape[1]] = z.gather(-1, order).float()
    ids[:, : order.shape[1]] = order.int()
    return values, ids, torch.logsumexp(z, dim=-1)


def check(logits: Tensor, k: int, inv_temperature: Tensor, impl: Any) -> None:
    values, ids, lse = impl(topk_logsumexp, logits, k, inv_temperature)
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
    *product((0, 1, 3), (1, 2, 63, 64, 65, 1023, 1025, 5003), (1, 20, 257)),
    (64, 1001, 20),
    (3, 40_009, 20),
    (1, 40_009, 257),
    (1, 128_256, 20),
    (2, 262_144, 257),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab", "k"), SIZES)
def test_sizes(impl: Any, rows: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    if impl.interpreted and rows * vocab > (10_000 if k == 257 else 50_000):
        pytest.skip("takes long in Triton's interpreter; smaller sizes take the same paths")
    inv_temperature = torch.linspace(0.3, 3.0, rows)
    check(draw(rows, vocab, dtype), k, inv_temperature, impl)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("offset", [-1e3, 0.0, 1e3])
def test_scales(impl: Any, scale: float, offset: float) -> None:
    logits = draw(3, impl.size(20_011, 3_001), torch.float32, scale) + offset
    check(logits, 20, torch.tensor([0.01, 1.0, 10.0]), impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number(impl: Any, dtype: torch.dtype) -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = words.view(dtype)
    numbers = numbers[numbers.isfinite()][None]
    check(numbers, min(numbers.shape[1], impl.most_columns), torch.ones(1), impl)
    check(-numbers, min(numbers.shape[1], impl.most_columns), torch.ones(1), impl)


@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_sorted_logits(impl: Any, direction: int) -> None:
    vocab = impl.size(50_000, 9_000)
    logits = direction * torch.arange(vocab, dtype=torch.float32)[None] * 1e-3
    check(logits, 100, torch.ones(1), impl)


def test_ties_take_the_lower_id(impl: Any) -> None:
    vocab = impl.size(40_000, 9_000)
    constant = torch.full((2, vocab), 1.25)
    check(constant, 256, torch.tensor([1.0, 0.5]), impl)
    few_levels = torch.randint(-3, 3, (4, vocab)).float()
    check(few_levels, 256, torch.ones(4), impl)


def test_negative_zero_ties_with_zero(impl: Any) -> None:
    logits = torch.tensor([[-0.0, 0.0, -0.0, -1.0, 0.0]])
    _, ids, _ = impl(topk_logsumexp, logits, 4, torch.ones(1))
    assert ids.tolist() == [[0, 1, 2, 4]]


def test_values_that_only_tie_after_the_temperature(impl: Any) -> None:
    logits = 1.9 + torch.arange(1000, dtype=torch.float32)[None] * 2**-23
    inv_temperature = torch.tensor([1.5])
    assert (logits * inv_temperature).unique().numel() < logits.unique().numel()
    check(logits, 100, inv_temperature, impl)


# ---------------------------------------------------------------------------- special numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity(impl: Any, dtype: torch.dtype) -> None:
    logits = draw(4, 3000, dtype)
    logits[0] = -INF
    logits[1, 1:] = -INF
    logits[2, :2500] = -INF
    logits[3, ::2] = -INF
    check(logits, min(600, impl.most_columns), torch.ones(4), impl)


def test_a_row_of_minus_infinity_has_lse_minus_infinity(impl: Any) -> None:
    logits = torch.full((1, impl.size(70_000, 7_000)), -INF)
    values, ids, lse = impl(topk_logsumexp, logits, 3, torch.ones(1))
    assert lse.item() == -INF
    assert values.tolist() == [[-INF] * 3]
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("others", [0.0, 50.0, -INF])
@pytest.mark.parametrize("where", [0, 700, -1])
def test_a_nan_makes_lse_nan_in_its_row_only(impl: Any, where: int, others: float) -> None:
    logits = torch.full((2, impl.size(70_000, 7_000)), others)
    logits[:, 5] = 1.0
    logits[0, where] = float("nan")
    _, _, lse = impl(topk_logsumexp, logits, 3, torch.ones(2))
    assert lse.isnan().tolist() == [True, False]


def test_padding_past_the_vocabulary(impl: Any) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    values, ids, _ = impl(topk_logsumexp, logits, 5, torch.ones(1))
    assert values.tolist() == [[3.0, 2.0, 1.0, -INF, -INF]]
    assert ids.tolist() == [[1, 2, 0, -1, -1]]


# ------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(impl: Any, dtype: torch.dtype) -> None:
    wide = draw(6, impl.size(5003, 1003), dtype)
    check(wide[:, :1000], 20, torch.ones(6), impl)
    check(wide[::2, 3:-50], 20, torch.ones(3), impl)
    check(wide[1:2, 7:].expand(3, -1), 20, torch.tensor([0.5, 1.0, 2.0]), impl)
    check(wide[:, 9:10], 20, torch.ones(6), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_columns(impl: Any, dtype: torch.dtype) -> None:
    if impl.name == "native":
        pytest.skip("the native ops want a stride of 1 along rows")
    logits = draw(3, 1500, dtype)
    check(logits.t().contiguous().t(), 20, torch.ones(3), impl)
    check(logits[:, ::2], 20, torch.ones(3), impl)
    fraction = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    check_tail(logits[:, ::2], torch.ones(3), torch.full((3,), 9), fraction, impl)


def test_strided_temperatures(impl: Any) -> None:
    check(draw(3, 1000, torch.float32), 20, torch.linspace(0.5, 2.0, 6)[::2], impl)


def test_neighbouring_rows_change_nothing(impl: Any) -> None:
    logits = draw(7, impl.size(40_009, 5_003), torch.float32)
    inv_temperature = torch.linspace(0.5, 2.0, 7)
    together = impl(topk_logsumexp, logits, 20, inv_temperature)
    alone = impl(topk_logsumexp, logits[4:5], 20, inv_temperature[4:5])
    for many, one in zip(together[:2], alone[:2], strict=True):
        assert torch.equal(many[4:5], one)
    rtol = 0 if impl.name == "native" else RTOL
    torch.testing.assert_close(together[2][4:5], alone[2], rtol=rtol, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_the_number_of_threads_changes_no_bit(impl: Any, threads: Any, rows: int) -> None:
    if impl.name != "native":
        pytest.skip("only the native ops share rows out among threads")
    logits, inv_temperature = draw(rows, 128_256, torch.bfloat16), torch.ones(rows)
    count = torch.full((rows,), 20)
    fraction = torch.linspace(0.1, 0.9, rows, dtype=torch.float64)
    found = []
    for number in (1, 2, 3, 8):
        threads(number)
        check(logits, 20, inv_temperature, impl)
        top = impl(topk_logsumexp, logits, 20, inv_temperature)
        found.append((*top, *impl(sample_tail, logits, inv_temperature, count, fraction)))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=0, atol=0)


def test_plans_for_many_rows(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows on a device of one processor are planned as a thousand are on a large one."""
    if not impl.interpreted:
        pytest.skip("the plan belongs to Triton; a real device has the processors it has")
    monkeypatch.setattr(tuning, "PROCESSORS", 1)
    logits = draw(3, 20_011, torch.bfloat16)
    assert tuning.scan(logits, 20, shifted=False).tiles > 1
    check(logits, 20, torch.ones(3), impl)
    check(torch.zeros(2, 20_011), 20, torch.ones(2), impl)


# --------------------------------------------------------------------------------- properties


def test_any_input(impl: Any) -> None:
    @settings(max_examples=impl.size(60, 10), deadline=None)
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        rows = data.draw(st.integers(1, 4), label="rows")
        vocab = data.draw(st.integers(1, 2500), label="vocab")
        k = data.draw(st.integers(1, 257), label="k")
        dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
        levels = data.draw(st.sampled_from([1, 3, 100, 2**20]), label="levels")
        scale = data.draw(st.floats(1e-3, 100.0), label="scale")
        gaps = data.draw(st.sampled_from([0.0, 0.1, 0.99]), label="share of -inf")
        shift = data.draw(st.integers(0, 3), label="elements skipped at the start of a row")
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
        logits = torch.randint(
            -levels, levels + 1, (rows, vocab + shift), generator=generator
        ).float()
        logits = logits * (scale / levels)
        logits[torch.rand(logits.shape, generator=generator) < gaps] = -INF
        inv_temperature = torch.rand(rows, generator=generator) * 4 + 0.01
        check(logits.to(dtype)[:, shift:], k, inv_temperature, impl)

    holds()


# --------------------------------------------------------------------------------------- tail


def check_tail(
    logits: Tensor, inv_temperature: Tensor, count: Tensor, fraction: Tensor, impl: Any
) -> None:
    """The token is that of the definition, or its neighbour where the draw falls between two."""
    token, z = impl(sample_tail, logits, inv_temperature, count, fraction)
    assert (token.dtype, z.dtype) == (torch.int64, torch.float64)
    asked = fraction >= 0
    assert (token[~asked] == -1).all()
    assert z[~asked].isnan().all()
    rows = torch.nonzero(asked)[:, 0]
    exact = (logits.float() * inv_temperature[:, None]).double()[rows]
    order = logits[rows].double().sort(dim=-1, descending=True, stable=True).indices
    sorted_z = exact.gather(1, order)
    ranks = torch.arange(order.shape[1])
    tail = sorted_z.masked_fill(ranks < count[rows][:, None], -INF)
    cumulative = torch.softmax(tail, -1).cumsum(-1)
    rank = (order == token[rows][:, None]).int().argmax(-1)
    after = cumulative.gather(1, rank[:, None])[:, 0]
    before = after - torch.softmax(tail, -1).gather(1, rank[:, None])[:, 0]
    assert (rank >= count[rows]).all(), "a candidate was drawn"
    assert (before <= fraction[rows] + 1e-6).all()
    assert (after >= fraction[rows] - 1e-6).all()
    assert torch.equal(z[rows], exact.gather(1, token[rows][:, None])[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [2, 65, 1025, 4096, 5003, 16_384])
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_tail_draws(impl: Any, dtype: torch.dtype, vocab: int, scale: float) -> None:
    rows = 4 if impl.interpreted else 64
    generator = torch.Generator().manual_seed(vocab)
    count = torch.randint(1, min(vocab, 300), (rows,), generator=generator)
    fraction = torch.rand(rows, generator=generator, dtype=torch.float64)
    fraction[::3], fraction[1], fraction[2] = -1.0, 0.0, 1 - 2.0**-53
    inv_temperature = torch.rand(rows, generator=generator) * 3 + 0.1
    check_tail(draw(rows, vocab, dtype, scale), inv_temperature, count, fraction, impl)


def test_tail_draws_among_ties_go_by_id(impl: Any) -> None:
    logits = torch.zeros(4, 1000)
    logits[:, 500] = 1.0
    fraction = torch.tensor([0.0, 0.25, 0.5, 0.9999], dtype=torch.float64)
    token, _ = impl(sample_tail, logits, torch.ones(4), torch.full((4,), 3), fraction)
    # Rank 0 is token 500, ranks 1 and 2 are tokens 0 and 1; the tail begins at token 2.
    assert token.tolist() == [2, 2 + 249, 2 + 498 + 1, 999]


def test_a_tail_of_a_few_possible_tokens(impl: Any) -> None:
    logits = torch.full((6, 900), -INF)
    logits[:, [3, 400, 899]] = torch.tensor([2.0, 1.0, 0.0])
    fraction = torch.linspace(0, 1 - 1e-9, 6, dtype=torch.float64)
    count = torch.tensor([1, 1, 1, 2, 2, 2])
    check_tail(logits, torch.ones(6), count, fraction, impl)
    token, _ = impl(sample_tail, logits, torch.ones(6), count, fraction)
    assert set(token.tolist()) <= {400, 899}


def test_any_tail(impl: Any) -> None:
    @settings(max_examples=impl.size(60, 10), deadline=None)
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        rows = data.draw(st.integers(1, 3), label="rows")
        vocab = data.draw(st.integers(2, 1500), label="vocab")
        dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
        levels = data.draw(st.sampled_from([1, 3, 100, 2**20]), label="levels")
        scale = data.draw(st.floats(1e-3, 30.0), label="scale")
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
        logits = torch.randint(-levels, levels + 1, (rows, vocab), generator=generator).float()
        count = torch.randint(1, vocab, (rows,), generator=generator)
        fraction = torch.rand(rows, generator=generator, dtype=torch.float64) * 1.2 - 0.2
        inv_temperature = torch.rand(rows, generator=generator) * 4 + 0.01
        check_tail((logits * (scale / levels)).to(dtype), inv_temperature, count, fraction, impl)

    holds()
