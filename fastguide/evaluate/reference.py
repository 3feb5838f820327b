"""How far responses of another policy are from the policy of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fastguide.engine.text import Prompt, encode
from fastguide.evaluate.estimates import Row
from fastguide.models.loading import load_tokenizer, load_weights, resolve_device, resolve_dtype

BATCH = 16
"""Responses of one pass."""


class Reference:
    """A policy that tells the likelihood of given responses.

    Args:
        path: path, hub id or packaged name.
        dtype: as in ``Engine``.
        device: as in ``Engine``.
        trust_remote_code: run code shipped with the checkpoint.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        trust = {"trust_remote_code": trust_remote_code}
        model = load_weights(AutoModelForCausalLM, path, dtype=resolve_dtype(dtype), **trust)
        self._model = model.to(resolve_device(device)).eval()  # type: ignore[arg-type]
        self.tokenizer = load_tokenizer(path, **trust)

    def log_ratios(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        temperature: float,
        *,
        greedy: bool = False,
    ) -> list[float | None]:
        """``log p(response | prompt)`` under what sampled it less that under this policy, in nats.

        Its mean over responses is the KL divergence of the two, without bias, whatever rule,
        guides or policy sampled them; a single one may be below zero.

        Args:
            rows: what was sampled: ``prompt``, ``token_ids`` and ``logprob`` of each.
            prompts: of the call that they are from.
            tokenizer: of what sampled them.
            temperature: of this policy, above 0.
            greedy: they were not drawn: each had probability 1, and the ratio is the exact KL.

        Returns:
            One for each row; None where tokenizers differ, so that there is no such ratio.
        """
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            return [None] * len(rows)
        texts = [encode(self.tokenizer, prompt) for prompt in prompts]
        # Like lengths together: rows of a batch are padded to the longest.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["token_ids"]))
        found: list[float | None] = [None] * len(rows)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            pairs = [(texts[rows[i]["prompt"]], rows[i]["token_ids"]) for i in chosen]
            for i, ours in zip(chosen, self._likelihoods(pairs, temperature), strict=True):
                found[i] = (0.0 if greedy else rows[i]["logprob"]) - ours
        return found

    @torch.inference_mode()
    def _likelihoods(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float
    ) -> list[float]:
        """The log-likelihood of each response after its prompt."""
        ids = torch.zeros(len(rows), max(len(p) + len(r) for p, r in rows), dtype=torch.int64)
        for row, (prompt, response) in zip(ids, rows, strict=True):
            row[: len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        ids = ids.to(self._model.device)
        # Right padding of causal rows changes nothing before it, so it needs no mask.
        logits = self._model(ids, use_cache=False).logits[:, :-1].float() / temperature
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return [
            row[len(prompt) - 1 : len(prompt) + len(response) - 1].double().sum().item()
            for row, (prompt, response) in zip(logprobs, rows, strict=True)
        ]
