"""Guided decoding as anyone would write it with transformers alone: the honest baseline.

Policy and guide are cached, and all k candidates go through the guide in one batch over an
expanded cache. The published code does less (``published.py``), fastguide needs no expanded cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache


class Method(NamedTuple):
    """VAS (eq. 4) with β, or ARGS with w, as ``strength``; temperature 0 is greedy."""

    name: Literal["vas", "args"]
    k: int
    strength: float
    temperature: float = 0.0


class HonestDecoding:
    """Requests of one length, decoded together, a token of each per step.

    Args:
        policy: a causal language model of transformers.
        guide: a decoder without a head that gives hidden states.
        head: hidden states ``[..., hidden]`` to a scalar ``[..., 1]``.
        prompts: token ids, all of one length: no padding is needed.
        method: how the guide's scalars change the policy.
        seed: of the draws.
    """

    @torch.inference_mode()
    def __init__(
        self,
        policy: Any,
        guide: Any,
        head: torch.nn.Module,
        prompts: Sequence[Sequence[int]],
        method: Method,
        seed: int = 0,
    ) -> None:
        self.policy, self.guide, self.head, self.method = policy, guide, head, method
        tokens = torch.tensor(prompts, device=policy.device)
        self.pending = tokens[:, -1:]
        """Tokens ``[B, 1]`` that the policy has not read."""
        self.policy_cache, self.guide_cache = DynamicCache(), DynamicCache()
        self.generator = torch.Generator(policy.device).manual_seed(seed)
        self.outside = 0
        """Steps in which a token was drawn that is no candidate."""
        self._read(tokens)
        if tokens.shape[1] > 1:
            policy.model(tokens[:, :-1], past_key_values=self.policy_cache)

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of every request."""
        output = self.policy(self.pending, past_key_values=self.policy_cache)
        logits = output.logits[:, -1].float()
        values, ids = logits.topk(self.method.k)
        scores = self._score(ids)
        if self.method.name == "vas":
            chosen, tokens = self._vas(logits, ids, scores)
        else:
            chosen, tokens = self._args(values, ids, scores)
        self._keep(chosen, tokens)
        self.pending = tokens
        return tokens[:, 0].tolist()

    def _score(self, ids: Tensor) -> Tensor:
        """The guide's scalars ``[B, k]`` of the candidates; its cache then has B × k rows."""
        batch, k = ids.shape
        for layer in self.guide_cache.layers:  # for B = 1 a view: the k copies appear once, below
            for name in ("keys", "values"):
                kept = getattr(layer, name)
                setattr(layer, name, kept[:, None].expand(-1, k, -1, -1, -1).flatten(0, 1))
        return self._read(ids.reshape(batch * k, 1)).view(batch, k)

    def _read(self, tokens: Tensor) -> Tensor:
        """Append tokens ``[N, n]`` to the guide's cache; the scalars ``[N]`` of the last ones."""
        output = self.guide(tokens, past_key_values=self.guide_cache)
        return self.head(output.last_hidden_state[:, -1])[:, 0].float()

    def _keep(self, chosen: Tensor, tokens: Tensor) -> None:
        """Leave in the guide's cache what belongs to the tokens ``[B, 1]``.

        ``chosen`` is each token's candidate, or a number below 0 where it is none.
        """
        first = torch.arange(len(chosen), device=chosen.device) * self.method.k
        self.guide_cache.batch_select_indices(first + chosen.clamp(min=0))
        if bool((chosen < 0).any()):
            self.outside += 1
            self.guide_cache.crop(-1)
            self._read(tokens)

    def _vas(self, logits: Tensor, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 4: candidates gain β (V − mean V), all other tokens keep their logits."""
        if self.method.temperature:
            logits = logits / self.method.temperature
        bonus = self.method.strength * (scores - scores.mean(-1, keepdim=True))
        tokens = self._pick(logits.scatter_add(1, ids, bonus))
        found = ids == tokens
        return torch.where(found.any(-1), found.int().argmax(-1), -1), tokens

    def _args(self, values: Tensor, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """log π₀ + w·r over the candidates; the logit is log π₀ up to a constant."""
        guided = values + self.method.strength * scores
        chosen = self._pick(guided / (self.method.temperature or 1.0))
        return chosen[:, 0], ids.gather(1, chosen)

    def _pick(self, logits: Tensor) -> Tensor:
        """Indices ``[B, 1]``: the best ones, or drawn."""
        if self.method.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)
