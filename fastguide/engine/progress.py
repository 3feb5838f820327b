"""A progress bar on standard error, for terminals only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, Task


@contextlib.contextmanager
def progress(
    total: int, wanted: bool | None = None, what: str = "completions"
) -> Iterator[Callable[[int], None]]:
    """A callable that takes how many of ``total`` are done.

    Args:
        total: all there is to do.
        wanted: show a bar; None shows one for more than one thing. Never without a terminal.
        what: the things counted.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
    )

    console = Console(stderr=True)
    show = total > 1 if wanted is None else wanted
    if not (show and console.is_terminal):
        yield lambda done: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), *pace())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


def pace() -> tuple[ProgressColumn, ...]:
    """Columns of a bar: how many a second, and the time left."""
    from rich.progress import ProgressColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    return Rate(), TimeRemainingColumn()
