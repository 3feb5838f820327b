"""Function guides: any Python function of the text or the token ids so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastguide.guides.base import LoadContext
from fastguide.scorer import Candidate, branch_of


@dataclass(frozen=True)
class FunctionGuide:
    """A Python function as a guide: called with prompt and response up to each candidate.

    Attributes:
        function: takes a text (or a list of token ids) and returns a number; with ``batched``
            takes a list of them and returns as many numbers.
        on: ``text`` or ``tokens``.
        batched: call once per step with all candidates of all requests.
    """

    function: Callable[[Any], Any]
    on: Literal["text", "tokens"] = "text"
    batched: bool = False

    def __post_init__(self) -> None:
        if self.on not in ("text", "tokens"):
            raise ValueError(f"on is {self.on!r}; allowed are text, tokens")
        if not callable(self.function):
            raise ValueError(f"function is {self.function!r}; allowed are callables")

    def load(self, context: LoadContext) -> FunctionScorer:
        """Bind the function to the policy's tokenizer and device."""
        return FunctionScorer(self, context.tokenizer, context.device)


class TokenState:
    """A request as plain token ids; nothing is cached."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def append(self, *tokens: int) -> None:
        """Continue the request."""
        self.tokens.extend(tokens)

    def fork(self) -> TokenState:
        """A second request with the same tokens."""
        return TokenState(self.tokens)

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on."""
        del self.tokens[length:]

    def close(self) -> None:
        """Forget all tokens."""
        self.tokens.clear()


class FunctionScorer:
    """Calls a ``FunctionGuide`` on every candidate; see ``fastguide.scorer.Scorer``."""

    context = None

    def __init__(
        self, guide: FunctionGuide, tokenizer: PreTrainedTokenizerBase, device: torch.device
    ) -> None:
        self.guide = guide
        self.tokenizer = tokenizer
        self.device = device

    def open(self, tokens: Sequence[int]) -> TokenState:
        """Start a request with its prompt's tokens."""
        return TokenState(tokens)

    def prefill(self, states: Sequence[TokenState]) -> None:
        """Nothing to compute."""

    def score(
        self, states: Sequence[TokenState], candidates: Sequence[Sequence[Candidate]]
    ) -> list[Tensor]:
        """The function's value of every continuation, per request ``[k_r]`` fp32.

        Raises:
            ValueError: if the function raises or returns something that is not a number each.
        """
        inputs: list[Any] = [
            [*state.tokens, *branch_of(c)]
            for state, row in zip(states, candidates, strict=True)
            for c in row
        ]
        if self.guide.on == "text":
            inputs = self.tokenizer.batch_decode(inputs, skip_special_tokens=True)
        function = self.guide.function
        name = getattr(function, "__name__", repr(function))
        try:
            raw = function(inputs) if self.guide.batched else [function(x) for x in inputs]
            values = torch.tensor([float(v) for v in raw], device=self.device)
        except Exception as error:
            raise ValueError(
                f"guide function {name} failed: {type(error).__name__}: {error}"
            ) from error
        if len(values) != len(inputs):
            raise ValueError(
                f"guide function {name} returned {len(values)} scores for {len(inputs)} candidates"
            )
        return list(values.split([len(row) for row in candidates]))
