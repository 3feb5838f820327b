"""Reward guides: a sequence classifier with one label scores the text so far (ARGS)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fastguide.guides.base import LoadContext, check_tokenizer
from fastguide.models.decoder import Decoder
from fastguide.models.loading import context_length, find_tokenizer, load_pretrained
from fastguide.models.quantization import check_scheme, shrink
from fastguide.scorer import TreeScorer


@dataclass(frozen=True)
class RewardGuide:
    """Any decoder that transformers loads as a sequence classifier with one label.

    The classifier's head is applied to each candidate's own row. Its ``forward`` is not used: that
    pools at the last token that is not padding, which is the wrong one whenever a candidate is
    the padding token (often the end of text too).

    Attributes:
        path: local path or hub id.
        device: where to compute; None is where the policy is.
        quantize: ``int8``, ``fp8`` or ``int4`` weights, as ``Engine``.
    """

    path: str | Path
    device: str | None = None
    quantize: str | None = None

    def load(self, context: LoadContext) -> TreeScorer:
        """Load the classifier.

        Raises:
            ValueError: for weights that are missing, corrupt or incomplete (a language model has
                no head that judges), several labels, an encoder, or a tokenizer that is not the
                policy's.
        """
        check_scheme(self.quantize)
        context = context.on(self.device)
        model = load_pretrained(
            AutoModelForSequenceClassification,
            self.path,
            dtype=context.dtype,
            device=context.device,
            trust_remote_code=context.trust_remote_code,
            allow_pickle=context.allow_pickle,
        )
        if model.config.num_labels != 1:
            raise ValueError(
                f"reward guide {str(self.path)!r} has {model.config.num_labels} labels; "
                "allowed is 1"
            )
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"reward guide {str(self.path)!r} is a {type(model).__name__}, whose head is not a "
                "linear `score` on the last hidden state; allowed are decoder classifiers"
            )
        tokenizer = find_tokenizer(self.path, trust_remote_code=context.trust_remote_code)
        check_tokenizer(
            str(self.path), tokenizer, model.config.get_text_config().vocab_size, context
        )

        weight = head.weight.float()  # scores in fp32: bf16 ties candidates that differ
        bias = None if head.bias is None else head.bias.float()

        def score(hidden: Tensor) -> Tensor:
            return F.linear(hidden.float(), weight, bias)

        backbone = cast(PreTrainedModel, model.base_model)
        shrink(backbone, self.quantize)
        decoder = Decoder(backbone, context_length(model.config))
        decoder.pack()
        return TreeScorer(decoder, score)
