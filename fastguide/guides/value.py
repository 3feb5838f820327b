"""Value guides: a causal backbone with a scalar head predicts a prefix's reward (VAS eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from fastguide.assets import absolute, resolve
from fastguide.guides.base import LoadContext, check_tokenizer
from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder
from fastguide.models.loading import context_length, find_tokenizer
from fastguide.models.parts import load_parts
from fastguide.models.quantization import check_scheme, shrink
from fastguide.models.support import check_config, check_model
from fastguide.models.value import ValueModel
from fastguide.scorer import TreeScorer


@dataclass(frozen=True)
class ValueGuide:
    """A guide folder written by ``ValueModel.save_pretrained``: full weights or LoRA, and a head.

    Attributes:
        path: local path, hub id or packaged name (``cheerful``, ``brief``).
        base: the base model of a LoRA guide (path, hub id or packaged name), if it is not where
            the guide's config says.
        device: where to compute, with weights of its own; None is where the policy is, sharing its
            weights if it can. On another device than the policy both compute at the same time.
        quantize: ``int8``, ``fp8`` or ``int4`` weights, as ``Engine``; then it shares none.
    """

    path: str | Path
    base: str | Path | None = None
    device: str | None = None
    quantize: str | None = None

    def load(self, context: LoadContext) -> TreeScorer:
        """Load backbone and head.

        A LoRA or a head on the policy's own weights shares them, and a pass; any other LoRA is
        merged into its backbone's weights.

        Raises:
            ValueError: for a missing or corrupt folder, an unsupported backbone or a tokenizer
                that is not the policy's.
        """
        check_scheme(self.quantize)
        alone = context.device if self.quantize else None
        context = context.on(self.device or alone)
        if (shared := self._share(context)) is not None:
            return shared
        model = ValueModel.from_pretrained(
            self.path,
            base=self.base,
            dtype=context.dtype,
            device=context.device,
            merge=True,
            attn_implementation=NAME,
            trust_remote_code=context.trust_remote_code,
            allow_pickle=context.allow_pickle,
        )
        backbone = cast(PreTrainedModel, model.backbone.requires_grad_(False))
        check_config(backbone.config)
        check_model(backbone)
        # A guide with full weights may hold no tokenizer: then its base model's is meant.
        tokenizer = find_tokenizer(
            self.path,
            backbone.config.name_or_path,
            model.base_path(resolve(self.path)),
            trust_remote_code=context.trust_remote_code,
        )
        check_tokenizer(
            str(self.path), tokenizer, backbone.config.get_text_config().vocab_size, context
        )
        shrink(backbone, self.quantize)
        decoder = Decoder(backbone, context_length(backbone.config))
        decoder.pack()
        return TreeScorer(decoder, model.head, model.config.kind)

    def _share(self, context: LoadContext) -> TreeScorer | None:
        """The guide on the policy's weights; None where it has others, or changes more of them."""
        policy = context.policy
        if policy is None:
            return None
        config = policy.model.config.get_text_config()
        parts = load_parts(self.path, self.base, config.hidden_size)
        if parts is None or absolute(Path(parts.base)) != context.policy_path:
            return None
        adapter = None
        if parts.factors is not None and (adapter := policy.add_adapter(parts.factors)) is None:
            return None
        tokenizer = find_tokenizer(self.path, trust_remote_code=context.trust_remote_code)
        check_tokenizer(str(self.path), tokenizer, config.vocab_size, context)
        return TreeScorer(policy, parts.head.to(context.device), parts.config.kind, adapter)
