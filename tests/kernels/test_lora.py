"""``lora_rows``: every implementation against the same arithmetic in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from fastguide.kernels import lora_rows, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(
    rows: int, width: int, out: int, rank: int, guides: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + width + out)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base, x = random(rows, out), random(rows, width)
    a, b = random(guides, rank, width) / width**0.5, random(guides, out, rank) / rank**0.5
    return tuple(t.to(dtype) for t in (base, x, a, b))  # type: ignore[return-value]


def check(impl: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, segments: list[int]) -> None:
    """At most twice the error of the chain that an engineer would write in the same precision."""
    cuts = torch.tensor(segments, dtype=torch.int32)
    found = impl(lora_rows, base, x, a, b, cuts)
    exact = reference.lora_rows(base.double(), x.double(), a.double(), b.double(), cuts)
    chain = base.clone()
    for g in range(len(segments) - 1):
        mine = slice(segments[g], segments[g + 1])
        chain[mine] += (x[mine] @ a[g].T) @ b[g].T
    assert found.dtype == base.dtype
    error, chain_error = ((t.double() - exact).abs().max() for t in (found, chain))
    # No sum is better than the rounding of its terms in fp32, and of its result in the dtype.
    sizes = (t.double().abs() for t in (base, x, a, b))
    terms = torch.finfo(torch.float32).eps * reference.lora_rows(*sizes, cuts).max()
    rounding = terms + torch.finfo(base.dtype).eps * exact.abs().max() / 2
    assert error <= 2 * max(chain_error, rounding)
    outside = torch.ones(len(base), dtype=torch.bool)
    outside[segments[0] : segments[-1]] = False
    assert torch.equal(found[outside], base[outside])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "out", "rank", "segments"),
    [
        (1, 64, 64, 8, [0, 1]),
        (41, 128, 96, 16, [1, 21, 41]),
        (20, 100, 130, 3, [0, 0, 7, 20]),
        (7, 256, 704, 64, [3, 7]),
        (70, 65, 17, 5, [2, 5, 5, 66]),
        (4, 32, 32, 4, [4, 4]),
    ],
)
def test_sizes(
    impl: Any, rows: int, width: int, out: int, rank: int, segments: list[int], dtype: torch.dtype
) -> None:
    check(impl, *inputs(rows, width, out, rank, len(segments) - 1, dtype), segments)


def test_strided_rows(impl: Any) -> None:
    base, x, a, b = inputs(12, 80, 90, 8, 1, torch.float32)
    check(impl, base[::2, :64], x[1::2, 5:69], a[:, :, :64], b[:, :64], [1, 6])


def test_strided_columns_and_segments(impl: Any) -> None:
    base, x, a, b = inputs(12, 80, 90, 8, 2, torch.float32)
    cuts = torch.tensor([1, 99, 5, 99, 11], dtype=torch.int32)[::2]
    given = (base, x, a, b)
    if impl.name != "native":  # which wants a stride of 1 along rows
        given = tuple(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in given)
    found = impl(lora_rows, *given, cuts)
    exact = reference.lora_rows(base, x, a, b, cuts.contiguous())
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_any_input(impl: Any) -> None:
    @settings(max_examples=impl.size(30, 10), deadline=None)
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        rows, width, out = (data.draw(st.integers(1, 70)) for _ in range(3))
        rank, guides = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 3))
        cuts = sorted(
            data.draw(st.lists(st.integers(0, rows), min_size=guides + 1, max_size=guides + 1))
        )
        dtype = data.draw(st.sampled_from(DTYPES))
        check(impl, *inputs(rows, width, out, rank, guides, dtype), cuts)

    holds()
