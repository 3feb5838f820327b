"""Guide any ``model.generate(...)`` call of transformers with fastguide's scorers and rules.

For example:

    guided = GuidedLogitsProcessor(
        {"cheerful": ValueGuide("cheerful")}, VAS(beta=4.0), tokenizer=tokenizer,
        temperature=0.7, attention_mask=inputs["attention_mask"],
    )
    model.generate(**inputs, do_sample=True, temperature=0.7, logits_processor=[guided])
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from fastguide import kernels
from fastguide.config import Rule
from fastguide.engine.sampler import mode_of
from fastguide.guides import Guide, LoadContext
from fastguide.guides.base import check_rule
from fastguide.kernels import reference
from fastguide.scorer import State, follow


class GuidedLogitsProcessor(LogitsProcessor):
    """Rewrites the base model's logits so that the host samples from the guided distribution.

    Works with greedy decoding, sampling and beams, batched and left-padded. One processor serves
    one ``generate`` call at a time; call ``reset`` before its prompts or padding change.
    """

    def __init__(
        self,
        guides: Mapping[str, Guide],
        rule: Rule,
        weights: Mapping[str, float] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float = 0.0,
        attention_mask: Tensor | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Load the guides.

        Args:
            guides: by name.
            rule: how their scores change the distribution.
            weights: by name; None weighs each guide 1.
            tokenizer: the policy's.
            temperature: the one that ``generate`` applies *after* its processors; 0 if it does
                not sample. The rule works at this temperature, and what is returned is scaled
                back by it.
            attention_mask: ``[B, T]`` of the prompts, if they are padded.
            device: of the guides.
            dtype: of the guides; None keeps each checkpoint's.
        """
        context = LoadContext(tokenizer, torch.device(device), dtype=dtype)
        self.scorers = {name: guide.load(context) for name, guide in guides.items()}
        given = dict.fromkeys(guides, 1.0) if weights is None else dict(weights)
        if unknown := given.keys() - guides.keys():
            raise ValueError(f"unknown guide {min(unknown)!r}; allowed are {', '.join(guides)}")
        self.weights = given
        for name, scorer in self.scorers.items():
            check_rule(rule, name, getattr(scorer, "kind", None))
        self.rule = rule
        self.row = rule.lower(temperature)
        self._states: dict[str, list[State]] = {name: [] for name in guides}
        self.reset(attention_mask)

    def reset(self, attention_mask: Tensor | None = None) -> None:
        """Forget all requests, and take the padding of the next prompts."""
        for name, states in self._states.items():
            self._states[name] = follow(self.scorers[name], states, [])
        self._padding = None if attention_mask is None else (attention_mask == 0).sum(-1).tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided logits ``[B, V]`` for the next token of each row ``[B, T]``.

        Raises:
            ValueError: for k above V, or a guide whose scores are not finite.
        """
        row, (count, vocab) = self.row, scores.shape
        if not self.rule.guided:
            return scores
        if row.k > vocab:
            raise ValueError(f"k is {row.k}; allowed are 1 to {vocab} (vocabulary)")
        padding = self._padding or [0] * count
        tokens = [
            ids[padding[i * len(padding) // count] :] for i, ids in enumerate(input_ids.tolist())
        ]
        inverse = torch.full((count,), row.inv_temperature, device=scores.device)
        z, ids, _ = kernels.topk_logsumexp(scores.float(), row.k, inverse)
        candidates = ids.tolist()
        given = z.new_zeros(len(self.weights), *z.shape)
        for own, name in zip(given, self.weights, strict=True):
            states = follow(self.scorers[name], self._states[name], tokens)
            self._states[name] = states
            own[:] = torch.stack(self.scorers[name].score(states, candidates))
            if not bool(torch.isfinite(own).all()):
                at = int((~torch.isfinite(own)).any(-1).nonzero()[0])
                raise ValueError(
                    f"guide {name!r} gave scores that are not finite for row {at} at token "
                    f"{len(tokens[at])}; allowed are finite scores"
                )
        rows = torch.ones_like(inverse, dtype=torch.float64)
        total = reference.composed_scores(
            given,
            rows.new_tensor(list(self.weights.values()))[:, None] * rows,
            rows * row.k,
            (rows * mode_of(row)).int(),
        )
        guided = reference.guided_values(
            z.double(),
            total,
            scale=rows * row.scale,
            weight=rows * row.weight,
            fill=rows * row.fill,
        )
        base = torch.full_like(scores, float("-inf")) if row.fill == reference.FILL_DROP else scores
        return base.scatter(1, ids.long(), (guided / row.inv_temperature).to(scores.dtype))
