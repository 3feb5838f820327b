"""What the reader of one request sees in asyncio, fed from the thread that decodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastguide.engine.samples import Event, Request
from fastguide.request import GenerationError, Piece


class Stream:
    """An async iterator of the pieces of one request; ``AsyncEngine.submit`` makes it.

    The thread that decodes calls ``tell`` and ``put``; everything else is the reader's.

    Raises ``GenerationError`` at its end if samples failed. It is read once; to stop reading early
    cancels the request, and so does ``cancel``.
    """

    def __init__(self, arguments: tuple[Any, ...], cancel: Callable[[Stream], None]) -> None:
        self.arguments = arguments
        self.request: Request | None = None
        self.ended = False
        """Whether everything has been handed to the reader, or it has cancelled."""
        self.gone = False
        """Whether the reader's event loop is closed."""
        self._cancel = cancel
        self._home = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        failed = []
        async for piece in self.pieces():
            if piece.completion is not None and piece.completion.finish_reason == "error":
                failed.append(piece.completion)
            yield piece
        if failed:
            raise GenerationError(failed)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """All pieces, with failed samples as such, and no error at the end."""
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stop the request; see ``AsyncEngine.cancel``."""
        self._cancel(self)

    def tell(self, event: Event) -> None:
        """Take news, in the thread that decodes."""
        done = event.completion if event.completion.finish_reason is not None else None
        text = event.text.take(final=done is not None) if event.text is not None else ""
        if text or done is not None:
            self.put(Piece(text, event.completion.sample, done))

    def put(self, item: Piece | BaseException | None) -> None:
        """Hand something to the reader; None is the end."""
        self.ended = self.ended or not isinstance(item, Piece)
        try:
            self._home.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # its event loop is closed: nobody waits any more
            self.gone = True
