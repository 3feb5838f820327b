"""What is measured of responses besides rewards, and intervals of means."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Estimate:
    """A mean over responses and the half-width of its 95 % interval, Student's.

    Responses to one prompt resemble each other, so the interval is that of the mean of the
    prompts' means.
    """

    mean: float | None
    """None where nothing was measured."""
    ci95: float | None
    """None with one prompt: nothing is known of the spread."""
    responses: int

    @classmethod
    def of(
        cls, by_prompt: Mapping[int, Sequence[float]], *, responses: int | None = None
    ) -> Estimate:
        """From the numbers of each prompt's responses; prompts weigh alike.

        ``responses`` says how many they are where these numbers are means already.
        """
        means = [statistics.fmean(values) for values in by_prompt.values() if values]
        if not means:
            return cls(None, None, 0)
        half = None
        if len(means) > 1:
            half = t95(len(means) - 1) * statistics.stdev(means) / math.sqrt(len(means))
        count = sum(map(len, by_prompt.values())) if responses is None else responses
        return cls(statistics.fmean(means), half, count)


@functools.cache
def t95(freedom: int) -> float:
    """How many standard errors to each side hold 95 % of Student's t.

    Args:
        freedom: degrees of freedom, from 1; 5 of 6 runs give 2.57, where a normal law has 1.96.
    """

    def inside(angle: float) -> float:
        """How likely it is that |t| < √freedom · tan(angle), as a finite sum."""
        cosine, term, total = math.cos(angle), 1.0, 0.0
        odd = freedom % 2
        for i in range(odd, freedom - 1, 2):
            term *= 1.0 if i == odd else cosine**2 * (i - 1) / i
            total += term
        if odd:
            return (angle + math.sin(angle) * cosine * total) * 2 / math.pi
        return math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def repetition(text: str, n: int) -> float:
    """rep-n: the share of a text's n-grams of words that occurred before in it; 0 without any."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def diversity(text: str) -> float:
    """The product of 1 - rep-n over n = 2, 3, 4 (as ARGS measures it); 1 repeats nothing."""
    return math.prod(1 - repetition(text, n) for n in (2, 3, 4))


class Coherence:
    """Cosine between sentence embeddings of prompt and response (as ARGS measures it).

    Args:
        path: an encoder of transformers, such as ``princeton-nlp/sup-simcse-bert-base-uncased``.
        pooling: ``pooler``, the encoder's own layer on the first token, as supervised SimCSE
            wants it; ``cls``, the first token as it is; or ``mean`` over all tokens. None is
            ``pooler`` where the weights have one, else ``cls``.
        batch_size: texts of one pass.
        device: None picks CUDA where there is one.
        trust_remote_code: run code shipped with the encoder.

    Raises:
        ValueError: no weights or tokenizer there, or another pooling.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pooling: str | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from fastguide.models.loading import load_tokenizer, resolve_device

        if pooling not in (None, "pooler", "cls", "mean"):
            raise ValueError(f"pooling is {pooling!r}; allowed are pooler, cls, mean")
        model = _encoder(path, pooling, trust_remote_code)
        has_pooler = getattr(model, "pooler", None) is not None
        if pooling == "pooler" and not has_pooler:
            raise ValueError(f"pooling is 'pooler', but the encoder {str(path)!r} has none")
        self._pooling = pooling or ("pooler" if has_pooler else "cls")
        self._batch_size = batch_size
        self._model = model.to(resolve_device(device)).eval().requires_grad_(False)
        self._tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The cosine of each pair, in [-1, 1]."""
        pairs = zip(self._embed(prompts), self._embed(responses), strict=True)
        return [torch.dot(one, other).item() for one, other in pairs]

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> list[torch.Tensor]:
        vectors: list[torch.Tensor] = []
        for start in range(0, len(texts), self._batch_size):
            batch = self._tokenizer(
                [text or " " for text in texts[start : start + self._batch_size]],
                padding=True,
                truncation=True,
                max_length=min(self._tokenizer.model_max_length, 512),
                return_tensors="pt",
            ).to(self._model.device)
            output = self._model(**batch)
            hidden = output.last_hidden_state.float()
            if self._pooling == "pooler":
                pooled = output.pooler_output.float()
            elif self._pooling == "cls":
                pooled = hidden[:, 0]
            else:
                mask = batch["attention_mask"][:, :, None]
                pooled = (hidden * mask).sum(1) / mask.sum(1)
            vectors += torch.nn.functional.normalize(pooled, dim=-1).unbind()
        return vectors


def _encoder(path: str | Path, pooling: str | None, trust: bool) -> Any:
    """The encoder; weights of masked language models have no pooler, which not all need."""
    from transformers import AutoModel

    from fastguide.models.loading import load_weights

    try:
        return load_weights(AutoModel, path, trust_remote_code=trust)
    except ValueError as error:
        if pooling == "pooler" or "pooler" not in str(error):
            raise
        return load_weights(AutoModel, path, trust_remote_code=trust, add_pooling_layer=False)


def win_rate(
    ours: Mapping[int, Sequence[tuple[float, float]]],
    theirs: Mapping[int, Sequence[tuple[float, float]]],
) -> Estimate:
    """How often our answer has the higher reward; ties half.

    Args:
        ours: by prompt, (probability, reward) of each response that may be the answer.
        theirs: likewise.
    """
    return Estimate.of(
        {
            prompt: [
                sum(p * q * ((a > b) + 0.5 * (a == b)) for p, a in group for q, b in theirs[prompt])
            ]
            for prompt, group in ours.items()
            if prompt in theirs
        },
        responses=sum(map(len, ours.values())),
    )


def matched(x: Sequence[float], y: Sequence[float], *, at: float) -> float | None:
    """A curve's y at an x, by straight lines between its points; None outside them."""
    points = sorted(zip(x, y, strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None
