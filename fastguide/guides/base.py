"""What a guide is: a description that becomes a ``Scorer`` when an engine loads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from fastguide.config import FUDGE, Rule
from fastguide.models.decoder import Decoder
from fastguide.models.loading import resolve_device
from fastguide.scorer import Scorer


@dataclass(frozen=True)
class LoadContext:
    """What an engine tells its guides when it loads them.

    Attributes:
        tokenizer: the policy's; candidates are its token ids.
        device: where to compute.
        dtype: of weights and caches, the policy's; None keeps each checkpoint's.
        trust_remote_code: run code shipped with checkpoints.
        allow_pickle: also load weights that are not safetensors.
        vocabulary: how many token ids the policy can give; None is taken from the tokenizer.
        policy: the policy itself, for guides that share its weights; None if they cannot.
        policy_path: where it was loaded from.
    """

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    vocabulary: int | None = None
    policy: Decoder | None = None
    policy_path: str | None = None

    def on(self, device: str | torch.device | None) -> LoadContext:
        """The same for a guide on another device; None is the policy's.

        Raises:
            ValueError: there is no such device.
        """
        return self if device is None else replace(self, device=resolve_device(device), policy=None)


class Guide(Protocol):
    """Anything that gives each candidate continuation a scalar; higher is better.

    To add a guide, write a class with ``load``; see ``FunctionGuide`` for the smallest one.
    """

    def load(self, context: LoadContext) -> Scorer:
        """Load weights and return the scorer that an engine calls at every step.

        Raises:
            ValueError: for weights that are missing, corrupt or do not fit the policy.
        """
        ...


def check_guides(guides: object) -> None:
    """Refuse what is no mapping of names to guides.

    Raises:
        ValueError: naming what was received.
    """
    if not isinstance(guides, Mapping):
        raise ValueError(f"guides is {guides!r:.80}; allowed is a mapping of names to guides")
    for name, guide in guides.items():
        if isinstance(guide, type) or not callable(getattr(guide, "load", None)):
            raise ValueError(
                f"guide {name!r} is {guide!r:.80}; allowed are ValueGuide(...), RewardGuide(...), "
                "FunctionGuide(...) and objects with a load method"
            )


def check_rule(rule: Rule, name: str, kind: str | None) -> None:
    """Refuse logits of a prefix classifier as values, and values as logits.

    Args:
        rule: what folds the guide's scores into the distribution.
        name: the guide, for the message.
        kind: what its scores are, as in ``GuideConfig``; None fits every rule.

    Raises:
        ValueError: the rule is FUDGE and the scores are values, or the other way round.
    """
    if kind == "classifier" and not isinstance(rule, FUDGE):
        raise ValueError(
            f"guide {name!r} is a prefix classifier, the rule is {type(rule).__name__}; "
            "allowed is FUDGE"
        )
    if kind == "value" and isinstance(rule, FUDGE):
        raise ValueError(
            f"guide {name!r} is a value model, the rule is FUDGE; allowed are VAS and ARGS"
        )


def check_tokenizer(
    name: str, guide: PreTrainedTokenizerBase | None, guide_vocab: int, context: LoadContext
) -> None:
    """Refuse a guide that reads token ids differently from the policy.

    Args:
        name: the guide, for the message.
        guide: its tokenizer, or None if its folder has none: then only sizes are compared.
        guide_vocab: rows of its embedding.
        context: the engine's; holds the policy's tokenizer.

    Raises:
        ValueError: naming the first difference.
    """
    policy = context.tokenizer.get_vocab()
    if guide is not None and guide.get_vocab() != policy:
        other = guide.get_vocab()
        differing = sum(other.get(token) != i for token, i in policy.items())
        raise ValueError(
            f"guide {name!r} has another tokenizer than the policy: {len(other)} tokens against "
            f"{len(policy)}, {differing} of the policy's differ; allowed is the same tokenizer"
        )
    # Embeddings may be padded past the tokenizer's ids, or end before its unused ones.
    needed = max(policy.values()) + 1
    if context.vocabulary is not None:
        needed = min(needed, context.vocabulary)
    if guide_vocab < needed:
        raise ValueError(
            f"guide {name!r} has {guide_vocab} token embeddings, but the policy gives ids up to "
            f"{needed - 1}; allowed is the same tokenizer"
        )
