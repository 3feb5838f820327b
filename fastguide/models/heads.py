"""Scalar heads on hidden states; they compute in fp32, whatever comes in."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

HeadKind = Literal["linear", "mlp"]


class ScalarHead(nn.Linear):
    """Linear map ``hidden [..., H] -> value [..., 1]``, zero at first."""

    kind: HeadKind = "linear"

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def begin_at(self, value: float) -> None:
        """Begin there instead of at zero."""
        nn.init.constant_(self.bias, value)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` of any float dtype to ``[..., 1]`` fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


class MLPHead(nn.Module):
    """One hidden layer of width H between hidden state and value, which is zero at first.

    For a frozen trunk: what a linear map cannot read out of its states, this may.
    """

    kind: HeadKind = "mlp"

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, dtype=torch.float32)
        self.hidden = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.value = ScalarHead(hidden_size)

    def begin_at(self, value: float) -> None:
        """Begin there instead of at zero."""
        self.value.begin_at(value)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` of any float dtype to ``[..., 1]`` fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.float()
            x = nn.functional.layer_norm(
                x, x.shape[-1:], self.norm.weight.float(), self.norm.bias.float()
            )
            x = nn.functional.linear(x, self.hidden.weight.float(), self.hidden.bias.float())
            value: torch.Tensor = self.value(nn.functional.gelu(x))
            return value


HEADS: dict[str, type[ScalarHead] | type[MLPHead]] = {"linear": ScalarHead, "mlp": MLPHead}
"""Heads by their name in a guide's config."""


def make_head(kind: str, hidden_size: int) -> ScalarHead | MLPHead:
    """A fresh head.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in HEADS:
        raise ValueError(f"head is {kind!r}; allowed are {', '.join(HEADS)}")
    return HEADS[kind](hidden_size)
