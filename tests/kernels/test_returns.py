"""``td_lambda``: every implementation against the mixture of n-step returns that defines it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastguide.kernels import reference, td_lambda


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_td_lambda_equals_the_forward_view(impl: Any, lam: float) -> None:
    """The recursion equals the mixture of n-step returns that defines it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 9, generator=generator)
    rewards = torch.randn(3, 9, generator=generator)
    mask = torch.tensor([[0] * 2 + [1] * 7, [1] * 9, [1] * 4 + [0] * 5], dtype=torch.bool)
    gamma = 0.9
    targets = impl(td_lambda, values, rewards, mask, gamma, lam)
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
            assert float(targets[row, t]) == pytest.approx(float(expected), abs=1e-5)
        assert (targets[row, ~mask[row]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "length"), [(0, 5), (3, 0), (1, 1), (4, 130), (33, 700), (2, 3000)]
)
def test_sizes(impl: Any, rows: int, length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(rows, length, generator=generator).to(dtype)
    rewards = torch.randn(rows, length, generator=generator).to(dtype)
    ends = torch.sort(torch.randint(0, length + 1, (rows, 2), generator=generator)).values
    at = torch.arange(length)
    mask = (at >= ends[:, :1]) & (at < ends[:, 1:])
    targets = impl(td_lambda, values, rewards, mask, 0.99, 0.95)
    exact = reference.td_lambda(values.double(), rewards.double(), mask, 0.99, 0.95)
    assert targets.dtype == dtype
    error = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    error *= 1 + impl.interpreted  # Triton's interpreter truncates where GPUs round
    torch.testing.assert_close(targets.double(), exact, rtol=error, atol=error)
    assert (targets[~mask] == 0).all()


def test_strided_rows(impl: Any) -> None:
    values, rewards = torch.randn(2, 10, 12).unbind()
    mask = torch.ones(10, 12, dtype=torch.bool)
    rows = [t[::2, 1:11] for t in (values, rewards, mask)]
    found = impl(td_lambda, *rows, 0.9, 0.5)
    copies = (t.contiguous() for t in rows)
    torch.testing.assert_close(found, reference.td_lambda(*copies, 0.9, 0.5), rtol=1e-5, atol=1e-6)
