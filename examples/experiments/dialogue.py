"""A reward of our own, for composition: how much of a story is spoken."""

from __future__ import annotations

import re

_SPOKEN = re.compile(r'"[^"]*"|"[^"]*$|[“][^”]*[”]?')


def share(prompt: str, response: str) -> float:
    """The share of a response's characters that are between quotation marks, in [0, 1]."""
    spoken = sum(len(found[0]) for found in _SPOKEN.finditer(response))
    return spoken / len(response) if response else 0.0
