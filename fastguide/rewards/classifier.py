"""Rewards from sequence classifiers of transformers, encoders and decoders, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fastguide.models.loading import (
    context_length,
    load_config,
    load_tokenizer,
    load_weights,
    resolve_device,
    resolve_dtype,
)
from fastguide.rewards.base import Sample

UNLIMITED = 2**20
"""Stands for no limit: tokenizers that have none say so by a number that is too large for them."""

ON = ("text", "pair", "response", "chat")


class ClassifierReward:
    """What a sequence classifier says of each response.

    With one label the reward is its logit (a reward model); with several, the log-probability of
    ``label``. Texts longer than the model's context lose their beginning.

    Args:
        path: local path or hub id.
        on: ``text`` (prompt and response in one), ``pair`` (as a pair of texts, as reward models
            on encoders want them), ``response`` alone (sentiment classifiers) or ``chat`` (as a
            user's message and its answer, in the template of the tokenizer).
        label: name or number of the label, where there are several.
        batch_size: texts of one pass.
        device: None picks CUDA where there is one.
        dtype: of the weights; None keeps the checkpoint's.
        trust_remote_code: run code shipped with the checkpoint.
        allow_pickle: also load weights that are not safetensors.
        weights: False leaves them out, for whoever needs its ``name`` alone; it cannot judge then.

    Raises:
        ValueError: weights that are missing or incomplete, no tokenizer, unknown ``on`` or label.
    """

    per_token = 0.0

    def __init__(
        self,
        path: str | Path,
        *,
        on: Literal["text", "pair", "response", "chat"] = "text",
        label: str | int | None = None,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        weights: bool = True,
    ) -> None:
        if on not in ON:
            raise ValueError(f"on is {on!r}; allowed are {', '.join(ON)}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; allowed are whole numbers from 1")
        self.on, self.batch_size = on, batch_size
        if weights:
            model: Any = load_weights(
                AutoModelForSequenceClassification,
                path,
                dtype=resolve_dtype(dtype),
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
            )
            self.model = model.to(resolve_device(device)).eval().requires_grad_(False)
            config = self.model.config
        else:
            config = load_config(path, trust_remote_code=trust_remote_code)
        self._label = _label(config, label, str(path))
        self._tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        self._tokenizer.truncation_side = "left"
        if on == "chat" and self._tokenizer.chat_template is None:
            raise ValueError(f"on is 'chat', but the tokenizer of {str(path)!r} has no template")
        self._longest = _longest(config, self._tokenizer.model_max_length)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # A decoder's classifier finds the last token by its id, whatever the tokenizer pads with.
        config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        chosen = "" if self._label is None else f"&label={self._label}"
        self.name = f"classifier:{path}?on={on}{chosen}"

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The reward of each sample; those of like length share a batch."""
        order = sorted(range(len(samples)), key=lambda i: -len(samples[i].response))
        rewards = [0.0] * len(samples)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for i, value in zip(chosen, self._judge([samples[i] for i in chosen]), strict=True):
                rewards[i] = value
        return rewards

    def _judge(self, samples: Sequence[Sample]) -> list[float]:
        texts: list[Any] = [[self._text(s) for s in samples]]
        if self.on == "pair":
            texts = [[s.prompt for s in samples], [s.response for s in samples]]
        batch = self._tokenizer(
            *texts,
            padding=True,
            truncation=True,
            max_length=self._longest,
            add_special_tokens=self.on != "chat",  # the template has them
            return_tensors="pt",
        ).to(self.model.device)
        logits: Tensor = self.model(**batch).logits.float()
        if self._label is None:
            return logits[:, 0].tolist()
        return torch.log_softmax(logits, dim=-1)[:, self._label].tolist()

    def _text(self, sample: Sample) -> str:
        if self.on == "chat":
            roles = {"user": sample.prompt, "assistant": sample.response}
            chat = [{"role": role, "content": text} for role, text in roles.items()]
            return str(self._tokenizer.apply_chat_template(chat, tokenize=False))
        # A text without a token cannot be read: it is judged as one space.
        text = sample.response if self.on == "response" else sample.prompt + sample.response
        return text or " "


def _longest(config: Any, of_tokenizer: int) -> int:
    """Most tokens of a text."""
    context = context_length(config) or min(of_tokenizer, UNLIMITED)
    if "roberta" in config.model_type:  # its positions begin behind the padding token's
        context -= config.pad_token_id + 1
    return min(context, of_tokenizer)


def _label(config: Any, label: str | int | None, name: str) -> int | None:
    """The number of the label, or None for a model with one logit."""
    names = {int(i): str(text) for i, text in config.id2label.items()}
    if config.num_labels == 1:
        if label is not None:
            raise ValueError(f"label is {label!r}, but the classifier {name!r} has one logit")
        return None
    for number, text in names.items():
        if str(label) in (text, str(number)):
            return number
    raise ValueError(f"label is {label!r}; the classifier {name!r} has {', '.join(names.values())}")
