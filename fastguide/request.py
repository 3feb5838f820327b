"""What goes into the engine and what comes out: plain data, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

MAX_SAMPLES = 100_000
"""Most samples of one prompt."""

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled and when it ends.

    Attributes:
        temperature: divides the base logits; 0 is greedy, for every rule. 1 is the model's own
            distribution; the command line takes 0.7 where none is given.
        max_tokens: most new tokens.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end it, besides the model's own end-of-text tokens.
        ignore_eos: go on past the model's end-of-text tokens.
        seed: draws depend on it and on the position only, so in fp32 a seed gives the same text
            in every batch. In bf16 and fp16 the logits are rounded otherwise in another batch,
            and a draw near a border may fall to the other side. None picks a seed at random,
            which the completion reports.
        n: samples per prompt, at most 100,000; sample i draws with ``sample_seed(seed, i)``.
    """

    temperature: float = 1.0
    max_tokens: int = 128
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        t = self.temperature
        if (
            isinstance(t, bool)
            or not isinstance(t, (int, float))
            or not (math.isfinite(t) and t >= 0)
        ):
            raise ValueError(f"temperature is {t!r}; allowed are 0 (greedy) and positive numbers")
        if 0 < t < 1e-3:
            raise ValueError(f"temperature is {t!r}; allowed are 0 (greedy) and 0.001 or more")
        for name in ("max_tokens", "n"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed are whole numbers from 1")
        if self.n > MAX_SAMPLES:
            raise ValueError(f"n is {self.n}; allowed are whole numbers from 1 to {MAX_SAMPLES}")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise ValueError(f"stop is {self.stop!r}; allowed are non-empty strings")
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int)
        ):
            raise ValueError(f"seed is {self.seed!r}; allowed are whole numbers and None")


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one of a prompt's n samples: the seed itself for sample 0, else mixed with it.

    The mixer is the finaliser of SplitMix64, so that the streams of ``(seed, sample)`` pairs are
    unrelated and ``seed + 1`` is no other sample's stream.

    Returns:
        A signed 64-bit number.
    """
    z = seed & _MASK64
    if sample:
        z = (z + sample * 0x9E3779B97F4A7C15) & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


FinishReason = Literal["stop", "length", "error", "aborted"]


@dataclass
class Completion:
    """One sampled continuation; the lists hold one entry per token of ``token_ids``.

    Attributes:
        prompt: index of its prompt in the call.
        sample: index among the prompt's n samples.
        text: the continuation, without the prompt, stop strings and special tokens.
        token_ids: new tokens, an end-of-text token included.
        finish_reason: ``stop`` (end-of-text or a stop string), ``length`` (max_tokens or the end
            of the context), ``error`` (see ``error``) or ``aborted`` (interrupted).
        logprobs: log-probability of each token under the guided distribution.
        base_logprobs: under the base model at the same temperature.
        kl: exact KL divergence of the guided from the base distribution at each step, in nats.
        scores: composed guide score of each token; None where it was not a scored candidate.
        scored: how many candidates were scored for each token.
        seed: in fp32, this seed gives it again, as sample 0 (see ``SamplingParams.seed``).
        prompt_tokens: tokens of the prompt; 0 where the prompt was refused, which one completion
            reports for all its samples.
        seconds: from admission to the last token.
        error: the reason, for ``error``.
    """

    prompt: int
    sample: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[float] = field(default_factory=list)
    base_logprobs: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    seed: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    @property
    def mean_kl(self) -> float:
        """Mean KL per token, in nats; 0 for no tokens."""
        return sum(self.kl) / max(1, len(self.kl))

    @property
    def mean_score(self) -> float | None:
        """Mean composed score of the tokens that were scored; None if none was."""
        scored = [s for s in self.scores if s is not None]
        return sum(scored) / len(scored) if scored else None


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed completion.

    Attributes:
        text: what this step added; pieces joined give the completion's text.
        sample: which of the prompt's n samples it belongs to.
        completion: the whole completion, with its last piece; None before.
    """

    text: str
    sample: int
    completion: Completion | None = None

    def __str__(self) -> str:
        return self.text


class GenerationError(ValueError):
    """Some requests of a call failed; the others finished and are kept.

    Attributes:
        outputs: every completion of the call; failed ones have ``finish_reason == "error"``.
    """

    def __init__(self, outputs: list[Completion]) -> None:
        failed = [c for c in outputs if c.finish_reason == "error"]
        first = failed[0].error or "unknown error"
        more = f" ({len(failed)} of {len(outputs)} completions failed; see .outputs)"
        super().__init__(first + (more if len(outputs) > 1 else ""))
        self.outputs = outputs


class GenerationInterrupt(KeyboardInterrupt):
    """Ctrl-C during a call; nothing that was done is lost.

    Attributes:
        outputs: the completions that ended before it, and those it cut short, which have
            ``finish_reason == "aborted"``.
    """

    def __init__(self, outputs: list[Completion]) -> None:
        super().__init__(f"interrupted with {len(outputs)} completions (see .outputs)")
        self.outputs = outputs
