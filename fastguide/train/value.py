"""Training a value model by TD(lambda) regression (sections 2.2 and C.1 of the VAS paper)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastguide.kernels import td_lambda
from fastguide.train.episodes import EpisodeBatch
from fastguide.train.prefix import PrefixTrainer
from fastguide.train.settings import PrefixConfig


@dataclasses.dataclass
class ValueConfig(PrefixConfig):
    """``PrefixConfig`` with the two numbers that define the targets.

    ``lam = 1`` gives Monte-Carlo returns ("Online FUDGE"), ``lam = 0`` one-step TD.

    Attributes:
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1].
    """

    gamma: float = 1.0
    lam: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


def value_losses(values: Tensor, batch: EpisodeBatch, gamma: float, lam: float) -> Tensor:
    """Squared errors between the states' values and their lambda-returns.

    Targets come from the same values, detached: ``G_T = r_T`` and, before it,
    ``G_t = r_t + gamma * ((1 - lam) * V(s_{t+1}) + lam * G_{t+1})``; most rewards are paid at s_T
    alone.

    Args:
        values: ``[B, T]`` fp32, the model's output for ``batch.input_ids``.
        batch: rows with their state mask and rewards.
        gamma: discount, in [0, 1].
        lam: in [0, 1]; 1 gives Monte-Carlo returns, 0 one-step TD.

    Returns:
        One fp32 for each state of the batch, ``[states]``.
    """
    targets = td_lambda(values.detach(), batch.rewards, batch.states, gamma, lam)
    return ((values - targets) ** 2)[batch.states]


class ValueTrainer(PrefixTrainer):
    """Trains a ``ValueModel`` on episodes by TD(lambda).

    Validation compares the values with the returns of held-out episodes, over all their states:
    ``eval_mse``; ``eval_explained_variance``, 1 - mse / variance of the returns; and
    ``eval_terminal_mse``, the error at s_T alone, where the return is certain.
    """

    args: ValueConfig

    def losses(self, values: Tensor, batch: EpisodeBatch) -> Tensor:
        """``value_losses``."""
        return value_losses(values, batch, self.args.gamma, self.args.lam)

    def statistics(self, values: Tensor, batch: EpisodeBatch) -> Tensor:
        """Squared errors, the last one, returns, and their squares."""
        returns = td_lambda(values, batch.rewards, batch.states, self.args.gamma, 1.0)
        error = ((values - returns) ** 2).masked_fill(~batch.states, 0.0)
        last = batch.states.sum(dim=1) + batch.states.int().argmax(dim=1) - 1
        at_last = error.gather(1, last[:, None])[:, 0].double()
        square, first, second = (x.double().sum(1) for x in (error, returns, returns**2))
        return torch.stack([square, at_last, first, second], dim=1)

    def metrics(self, sums: Sequence[float], states: int, episodes: int) -> dict[str, float]:
        """From the sums over all episodes."""
        square, terminal, first, second = sums
        mse, variance = square / states, second / states - (first / states) ** 2
        return {
            "mse": float(mse),
            "explained_variance": float(1 - mse / variance) if variance > 0 else 0.0,
            "terminal_mse": float(terminal / episodes),
        }
