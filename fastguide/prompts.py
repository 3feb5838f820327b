"""Prompts from files, and texts as what a user says to a chat model. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_file(path: str | Path) -> list[str]:
    """Prompts of a file, one per line; blank lines are skipped.

    Lines of ``.jsonl`` files are texts in JSON or objects with a ``prompt``, so that prompts of
    several lines have a place, too.

    Raises:
        ValueError: the file cannot be read, holds no prompt, or a line is none.
    """
    name = repr(str(path))
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read prompts from {name}: {error.strerror}") from error
    return read_lines(data, name, as_json=Path(path).suffix == ".jsonl")


def read_lines(data: bytes, name: str, *, as_json: bool = False) -> list[str]:
    """Prompts of what was read; ``name`` says where it is from.

    Raises:
        ValueError: as ``read_file``.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read prompts from {name}: it is not UTF-8 text") from error
    lines = [(i, line.rstrip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{name} holds no prompt; allowed is one per line")
    return [_prompt(line, f"line {i} of {name}") if as_json else line for i, line in lines]


def _prompt(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if isinstance(found, dict):
        found = found.get("prompt")
    if not isinstance(found, str):
        raise ValueError(
            f"{where} is {line[:80]!r}; allowed are texts and objects whose 'prompt' is one"
        )
    return found


def as_chat(text: str) -> list[dict[str, Any]]:
    """The messages of a chat in which a user has said ``text``."""
    return [{"role": "user", "content": text}]
