"""Signs of life on standard error, for terminals only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner while something takes a while."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield
