"""The engine for servers: one thread decodes, any number of asyncio tasks wait for their texts."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

from fastguide.config import Rule
from fastguide.engine.calls import check_errors
from fastguide.engine.engine import Engine
from fastguide.engine.requests import per_prompt
from fastguide.engine.samples import Event, Request
from fastguide.engine.stats import EngineStats
from fastguide.engine.streams import Stream
from fastguide.engine.text import Prompt
from fastguide.models.loading import one_line
from fastguide.request import Completion, GenerationError, Piece, SamplingParams


class AsyncEngine:
    """Serves an ``Engine`` to asyncio: requests join the batch that is running, and leave it.

    >>> async with AsyncEngine(Engine()) as engine:
    ...     async for piece in engine.stream("Once upon a time", VAS(beta=4.0)):
    ...         print(piece, end="")

    One bad request never harms another. Should decoding itself fail, for want of memory say, every
    caller that waits gets the reason.
    """

    def __init__(self, engine: Engine) -> None:
        """Start the thread that decodes.

        Args:
            engine: loaded; it may still be called directly, and shares its batch then.
        """
        self.engine = engine
        self._wake = threading.Condition()
        self._joining: deque[Stream] = deque()
        self._leaving: deque[Stream] = deque()
        self._streams: dict[Request, Stream] = {}
        self._closed: str | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="fastguide", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """What runs and waits, and what the caches hold."""
        return self.engine.stats

    def submit(
        self,
        prompt: Prompt,
        rule: Rule | None = None,
        weights: Mapping[str, float] | None = None,
        sampling: SamplingParams | None = None,
        index: int = 0,
    ) -> Stream:
        """Queue a prompt now; its pieces are read from what this returns, in a running event loop.

        Args:
            prompt: as in ``Engine.generate``, and so are the others.
            rule: how guides steer.
            weights: of guides by name.
            sampling: how.
            index: number of the prompt, for its completions and messages.

        Raises:
            RuntimeError: the engine is draining, closed or has broken down.
        """
        stream = Stream((prompt, rule, weights, sampling, index), self.cancel)
        with self._wake:
            if self._closed is not None:
                raise RuntimeError(self._closed)
            self._joining.append(stream)
            self._wake.notify()
        return stream

    async def stream(
        self,
        prompt: Prompt,
        rule: Rule | None = None,
        weights: Mapping[str, float] | None = None,
        sampling: SamplingParams | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of one prompt's completions as they are decoded; arguments as in ``submit``.

        Closing the generator, or cancelling the task that reads it, cancels the request.

        Raises:
            GenerationError: if samples failed, after the others have ended.
            RuntimeError: decoding failed, or the engine takes no more requests.
        """
        stream = self.submit(prompt, rule, weights, sampling)
        try:
            async for piece in stream:
                yield piece
        finally:  # at once: the iterator above ends when the event loop comes to it
            stream.cancel()

    async def generate(
        self,
        prompt: Prompt,
        rule: Rule | None = None,
        weights: Mapping[str, float] | None = None,
        sampling: SamplingParams | None = None,
        *,
        errors: str = "raise",
        index: int = 0,
    ) -> list[Completion]:
        """The completions of one prompt, in the order of its samples; arguments as in ``submit``.

        Args:
            prompt: one; call several times, in tasks of their own, for several.
            rule: see ``submit``.
            weights: see ``submit``.
            sampling: see ``submit``.
            errors: ``raise``, or ``return`` failed samples as completions.
            index: see ``submit``.

        Raises:
            GenerationError: samples failed; its ``outputs`` has all of them.
            RuntimeError: decoding failed, or the engine takes no more requests.
        """
        check_errors(errors)
        stream = self.submit(prompt, rule, weights, sampling, index)
        done = []
        try:
            async for piece in stream.pieces():
                if piece.completion is not None:
                    done.append(piece.completion)
        finally:
            stream.cancel()
        done.sort(key=lambda completion: completion.sample)
        if errors == "raise" and any(c.finish_reason == "error" for c in done):
            raise GenerationError(done)
        return done

    def cancel(self, stream: Stream) -> None:
        """Stop a request: its slots are free within one step. Its reader sees no more pieces."""
        with self._wake:
            if not stream.ended:
                self._leaving.append(stream)
                self._wake.notify()

    async def drain(self) -> None:
        """Take no more requests, finish those that were taken, and stop the thread."""
        self._close("the engine is draining; it takes no more requests")
        await asyncio.to_thread(self._thread.join)

    async def close(self) -> None:
        """Take no more requests, cancel those that were taken, and stop the thread."""
        self._close("the engine is closed; it takes no more requests")
        self._stopping = True
        await asyncio.to_thread(self._thread.join)

    def drain_on(self, signals: Iterable[int] = (signal.SIGTERM,)) -> asyncio.Future[None]:
        """Drain when one of these signals comes, as a supervisor sends before it kills.

        To be called in the main thread's running event loop.

        Returns:
            A future that is done when everything has been finished: a server awaits it and ends.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        tasks: set[asyncio.Task[None]] = set()  # the event loop itself keeps them only weakly

        async def drain() -> None:
            await self.drain()
            if not done.done():
                done.set_result(None)

        for number in signals:
            loop.add_signal_handler(number, lambda: tasks.add(loop.create_task(drain())))
        return done

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, kind: Any, *_: object) -> None:
        await (self.drain() if kind is None else self.close())

    def _close(self, reason: str) -> None:
        with self._wake:
            self._closed = self._closed or reason
            self._wake.notify()

    def _work(self) -> None:
        """The thread: take what came, make a step, hand out the news; sleep while there is none."""
        try:
            while True:
                with self._wake:
                    while not (self._joining or self._leaving or self._streams or self._closed):
                        self._wake.wait()
                while self._joining:
                    self._join(self._joining.popleft())
                while self._leaving:
                    self._leave(self._leaving.popleft())
                if self._stopping:
                    self._drop(self._closed)
                if self._streams:
                    self._step()
                    time.sleep(0)  # others want the loop's lock, too
                elif self._closed and not self._joining:
                    return
        except BaseException as error:  # no caller may hang
            self._close(f"the engine broke down: {one_line(error)}")
            raise
        finally:
            self._drop(self._closed)
            for stream in self._joining:
                stream.put(RuntimeError(self._closed))

    def _join(self, stream: Stream) -> None:
        prompt, rule, weights, sampling, index = stream.arguments
        try:
            (one_rule,) = per_prompt("rule", rule, 1)
            (weighing,) = per_prompt("weights", weights, 1)
            (params,) = per_prompt("sampling", sampling, 1)
            request = self.engine.request(prompt, one_rule, weighing, params, index)
        except Exception as error:
            what = str(error) if isinstance(error, ValueError) else one_line(error)
            stream.tell(Event(None, Completion(index, 0, finish_reason="error", error=what), None))
            stream.put(None)
            return
        stream.request = request
        self._streams[request] = stream
        self.engine.loop.add(request)
        self._tell(request, stream)

    def _leave(self, stream: Stream) -> None:
        if stream.request is not None and self._streams.pop(stream.request, None) is not None:
            self.engine.loop.cancel(stream.request)
        stream.put(None)

    def _drop(self, reason: str | None) -> None:
        """Cancel everything, and tell every reader why."""
        for request, stream in list(self._streams.items()):
            self.engine.loop.cancel(request)
            stream.put(RuntimeError(reason))
        self._streams.clear()

    def _step(self) -> None:
        try:
            self.engine.loop.step()
        except Exception as error:
            self._drop(f"decoding failed: {one_line(error)}")
        for request, stream in list(self._streams.items()):
            self._tell(request, stream)

    def _tell(self, request: Request, stream: Stream) -> None:
        """Hand the news of a request to its reader; a reader that is gone cancels it."""
        with self.engine.loop.lock:
            for event in request.news.values():
                stream.tell(event)
            request.news.clear()
            live = request.live
        if not live:
            stream.put(None)
            self._streams.pop(request, None)
        elif stream.gone:
            self._leave(stream)
