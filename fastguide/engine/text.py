"""Token ids in, text out: prompts of any form, incremental decoding, stop strings."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids (also a one-dimensional array or tensor), or chat messages
(``{"role": ..., "content": ...}``)."""

_ALLOWED = "a text, a list of token ids, or chat messages with 'role' and 'content'"

CONTEXT_TOKENS = 6  # prompt tokens decoded along, so that a first space or a split rune is right
_REPLACEMENT = "�"


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: texts get the tokenizer's special tokens, chats its template.

    Raises:
        ValueError: for a prompt that is empty or of another kind, or a chat where the tokenizer
            has no template.
    """
    if isinstance(prompt, str):
        tokens = list(tokenizer(prompt)["input_ids"]) if prompt else []
    else:
        items = _items(prompt)
        if items is not None and all(_is_token(item) for item in items):
            tokens = items
        elif items is not None and all(
            isinstance(item, Mapping) and {"role", "content"} <= item.keys() for item in items
        ):
            tokens = _encode_chat(tokenizer, items)
        else:
            raise ValueError(f"the prompt is {_shown(prompt)}; allowed are {_ALLOWED}")
    if not tokens:
        raise ValueError("the prompt is empty; allowed is one token or more")
    return tokens


def _encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Any]) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError("the prompt is a chat, but the tokenizer has no chat template; use a text")
    return list(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several: a bare text, id list or chat is one.

    Raises:
        ValueError: for what is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    items = _items(prompts)
    if items is None:
        raise ValueError(
            f"prompts is {_shown(prompts)}; allowed are {_ALLOWED}, and lists of such prompts"
        )
    if items and (_is_token(items[0]) or isinstance(items[0], Mapping)):
        return [items]
    return items


def _items(value: Any) -> list[Any] | None:
    """What a list, array or tensor holds, numbers as Python's own; None for anything else."""
    value = _plain(value)
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return None
    return [_plain(item) for item in value]


def _plain(value: Any) -> Any:
    """NumPy's and torch's arrays and numbers as lists and numbers of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value in a message: on one line, and not all of a long one."""
    return textwrap.shorten(repr(_plain(value)), 80, placeholder=" …")


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """Token ids to text without special tokens."""

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return decode


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a response, by the model's configs and its tokenizer."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return frozenset(found)


class TextStream:
    """Decodes one response as it grows, and ends it at a stop string.

    Text is given out once it can no longer change: not while it ends in part of a character,
    and not while it ends in what may become a stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._start, self._read = 0, len(self._ids)
        self._stop = tuple(stop)
        self._given = 0

    def add(self, token: int) -> bool:
        """Take the next token; True if a stop string has been completed, which ends the text."""
        self._ids.append(token)
        if self._stop:  # else nobody needs the text before it is taken
            self._read_on()
        return self.stopped

    def finish(self) -> None:
        """Take in everything, also what was held back as it might be part of a character."""
        self._read_on(final=True)

    def take(self, final: bool = False) -> str:
        """Text that is new since the last call and certain to stay; all of it if ``final``."""
        self._read_on(final)
        end = len(self.text)
        if not final and not self.stopped:
            end -= max((_overlap(self.text, s) for s in self._stop), default=0)
        end = max(end, self._given)
        piece = self.text[self._given : end]
        self._given = end
        return piece

    def _read_on(self, final: bool = False) -> None:
        """Decode the tokens since the last read, together with the read before them."""
        if self.stopped or self._read == len(self._ids):
            return
        before = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._ids))
        if final or (len(now) > len(before) and not now.endswith(_REPLACEMENT)):
            self._grow(now[len(before) :])
            self._start, self._read = self._read, len(self._ids)

    def _grow(self, more: str) -> None:
        longest = max(map(len, self._stop), default=0)
        start = max(0, len(self.text) - longest)
        self.text += more
        found = [i for i in (self.text.find(s, start) for s in self._stop) if i >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _decode(self, start: int, end: int) -> str:
        ids = self._ids[start:end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next(
        (n for n in range(min(len(stop), len(text)), 0, -1) if stop.startswith(text[-n:])), 0
    )
