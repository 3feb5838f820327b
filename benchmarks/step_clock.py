"""Seconds of each token of somebody else's decoding loop. Needs torch alone: any environment."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class StepClock:
    """Notes the time whenever a model is called, which a decoding loop does once for a token.

    with StepClock(model) as clock:
        model.generate(...)
    clock.seconds  # of each token but the first, whose time is the prompt's
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.times: list[float] = []

    def __enter__(self) -> StepClock:
        self.handle = self.model.register_forward_pre_hook(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._note()
        self.handle.remove()

    def _note(self, *call: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """From one call of the model to the next; the prompt's own is left out."""
        return [b - a for a, b in pairwise(self.times[1:])]
