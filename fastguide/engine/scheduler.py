"""Which requests run: waiting ones are admitted in order while there is room. No tensors here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that takes up rows of a batch."""

    @property
    def rows(self) -> int:
        """Batch rows it takes up now."""


T = TypeVar("T", bound=Sized)


class Scheduler(Generic[T]):
    """First come, first served, up to a number of rows that decode together."""

    def __init__(self, waiting: Iterable[T], max_rows: int) -> None:
        """Queue requests.

        Args:
            waiting: requests in order of admission.
            max_rows: most rows at once; a request larger than this runs alone.
        """
        self._waiting = deque(waiting)
        self._max_rows = max_rows
        self.running: list[T] = []

    def admit(self) -> list[T]:
        """Move waiting requests that fit into ``running`` and return them."""
        used = sum(request.rows for request in self.running)
        admitted: list[T] = []
        while self._waiting:
            rows = self._waiting[0].rows
            if used and used + rows > self._max_rows:
                break
            used += rows
            admitted.append(self._waiting.popleft())
        self.running += admitted
        return admitted

    @property
    def done(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting and not self.running
