"""The state convention and the two ends of TD(lambda)."""

from __future__ import annotations

import pytest
import torch

from fastguide.kernels.reference import td_lambda
from fastguide.train.episodes import Episode, collate
from fastguide.train.value import value_losses


def test_states_run_from_the_last_prompt_token_to_the_last_response_token() -> None:
    batch = collate([Episode((7, 8, 9), (4, 5), 2.5), Episode((3,), (6, 6, 6, 0), -1.0)])
    assert batch.input_ids.tolist() == [[7, 8, 9, 4, 5], [3, 6, 6, 6, 0]]
    assert batch.states.tolist() == [[False, False, True, True, True], [True] * 5]
    assert batch.rewards.tolist() == [[0, 0, 0, 0, 2.5], [0, 0, 0, 0, -1.0]]


def test_an_empty_response_has_one_state() -> None:
    batch = collate([Episode((7, 8), (), 1.0), Episode((1, 2, 3), (), 1.0)])
    assert batch.states.tolist() == [[False, True, False], [False, False, True]]
    assert batch.rewards.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_rewards_paid_per_token_add_up() -> None:
    batch = collate([Episode((1, 2), (3, 4, 5), 2.0, token_reward=-0.5)])
    assert batch.rewards.tolist() == [[0.0, 0.0, -0.5, -0.5, 1.5]]
    returns = td_lambda(torch.zeros(1, 5), batch.rewards, batch.states, 1.0, 1.0)
    assert returns.tolist() == [[0.0, 0.5, 0.5, 1.0, 1.5]]


def test_targets_by_hand() -> None:
    # Two prompt tokens, two response tokens: s_0, s_1, s_2 at positions 1, 2, 3; padding at 4.
    batch = collate([Episode((1, 1), (1, 1), 10.0), Episode((1, 1), (1, 1, 1), 0.0)])
    values = torch.tensor([[99.0, 1.0, 2.0, 3.0, 99.0], [0.0] * 5])
    gamma, lam = 0.5, 0.75
    targets = td_lambda(values, batch.rewards, batch.states, gamma, lam)[0]
    g_2 = 10.0
    g_1 = gamma * ((1 - lam) * 3.0 + lam * g_2)
    g_0 = gamma * ((1 - lam) * 2.0 + lam * g_1)
    assert targets.tolist() == [0.0, g_0, g_1, g_2, 0.0]
    errors = [(1.0 - g_0) ** 2, (2.0 - g_1) ** 2, (3.0 - g_2) ** 2, 0, 0, 0, 0]
    losses = value_losses(values, batch, gamma, lam)
    assert losses.tolist() == pytest.approx(errors)


def test_lambda_one_is_monte_carlo() -> None:
    batch = collate([Episode((1, 2), (3, 4, 5), 2.0), Episode((1,), (2,), -3.0)])
    values = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    targets = td_lambda(values, batch.rewards, batch.states, 1.0, 1.0)
    for row, reward in enumerate([2.0, -3.0]):
        assert targets[row][batch.states[row]].unique().tolist() == [reward]
    discounted = td_lambda(values, batch.rewards, batch.states, 0.5, 1.0)
    assert discounted[0].tolist() == [0.0, 0.25, 0.5, 1.0, 2.0]


def test_lambda_zero_is_one_step() -> None:
    batch = collate([Episode((1, 2), (3, 4, 5), 2.0)])
    values = torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0]])
    targets = td_lambda(values, batch.rewards, batch.states, 0.5, 0.0)
    assert targets.tolist() == [[0.0, 1.0, 1.5, 2.0, 2.0]]


def test_the_targets_carry_no_gradient() -> None:
    batch = collate([Episode((1,), (1,), 1.0)])
    values = torch.tensor([[0.0, 0.5]], requires_grad=True)
    value_losses(values, batch, 1.0, 0.0).mean().backward()
    assert values.grad is not None
    # d/dV of ((V_0 - V_1.detach())^2 + (V_1 - 1)^2) / 2
    torch.testing.assert_close(values.grad, torch.tensor([[-0.5, -0.5]]))
