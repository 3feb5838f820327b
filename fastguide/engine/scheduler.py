"""Which samples run: requests are admitted in order while there is room. No tensors here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar


class Work(Protocol):
    """A request of several samples, each of which takes up a row of the batch."""

    @property
    def waiting(self) -> int:
        """Samples that have not started."""

    @property
    def rows(self) -> int:
        """Batch rows it takes up now: its samples that run."""


T = TypeVar("T", bound=Work)


class Scheduler(Generic[T]):
    """First come, first served, up to a number of rows that decode together."""

    def __init__(self, waiting: Iterable[T], max_rows: int) -> None:
        """Queue requests.

        Args:
            waiting: requests in order of admission.
            max_rows: most rows at once; samples of a request that do not fit start later.
        """
        self._waiting = deque(waiting)
        self._max_rows = max_rows
        self.running: list[T] = []

    def admit(self) -> list[tuple[T, int]]:
        """The requests that start samples now, each with how many; they are now ``running``."""
        room = self._max_rows - sum(request.rows for request in self.running)
        admitted: list[tuple[T, int]] = []
        while self._waiting and room > 0:
            request = self._waiting[0]
            count = min(room, request.waiting)
            if count:
                admitted.append((request, count))
                room -= count
            if request not in self.running:
                self.running.append(request)
            if count < request.waiting:
                break
            self._waiting.popleft()
        return admitted

    def retire(self) -> None:
        """Forget running requests that have neither rows nor samples left to start."""
        self.running = [r for r in self.running if r.rows or r.waiting]

    @property
    def done(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting and not self.running
