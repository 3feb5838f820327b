"""A call of the engine: hands its requests to the loop bit by bit, and gives out its news."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from fastguide.engine.loop import Loop
from fastguide.engine.progress import progress as progress_bar
from fastguide.engine.samples import Event, Request
from fastguide.engine.text import TextStream
from fastguide.request import Completion, GenerationError, GenerationInterrupt

T = TypeVar("T")


def check_errors(errors: str) -> None:
    """Refuse what ``generate`` cannot do about failed requests.

    Raises:
        ValueError: naming what is allowed.
    """
    if errors not in ("raise", "return"):
        raise ValueError(f"errors is {errors!r}; allowed are raise, return")


def gather(
    completions: Iterator[Completion], total: int, errors: str, progress: bool | None
) -> list[Completion]:
    """All completions in the order of prompts and samples; see ``Engine.generate``.

    Args:
        completions: as they finish.
        total: how many they will be.
        errors: ``raise`` or ``return``.
        progress: whether to show a bar; None is as ``progress`` decides.

    Raises:
        GenerationError: for ``raise``, if any failed.
        GenerationInterrupt: with what was done.
    """
    done: list[Completion] = []
    try:
        with progress_bar(total, progress) as note:
            for completion in completions:
                done.append(completion)
                note(len(done))
    except KeyboardInterrupt as interrupt:
        raise GenerationInterrupt(done) from interrupt
    done.sort(key=lambda c: (c.prompt, c.sample))
    if errors == "raise" and any(c.finish_reason == "error" for c in done):
        raise GenerationError(done)
    return done


def decode(
    loop: Loop,
    requests: Iterator[Request | Completion],
    emit: Callable[[Completion, TextStream | None], T | None],
) -> Generator[T, None, None]:
    """Step the loop until all requests have ended.

    Requests are taken when they can start soon: there may be very many. Other callers' requests
    move on with the steps, too; on an interrupt only those of this call are aborted.

    Args:
        loop: shared by all callers.
        requests: of this call, and completions of those that were refused already.
        emit: sees each sample that has news and says what to yield; None is nothing.
    """
    news: dict[int, Event] = {}
    live: list[Request] = []
    more = True

    def feed() -> bool:
        """Queue as many requests as can start soon; False if there are none left to take."""
        live[:] = [request for request in live if request.live]
        waiting = sum(request.waiting for request in live)
        while waiting < loop.scheduler.max_rows:
            request = next(requests, None)
            if request is None:
                return False
            if isinstance(request, Completion):
                news[id(request)] = Event(None, request, None)
                continue
            request.news = news
            loop.add(request)
            live.append(request)
            waiting += request.waiting
        return True

    def items() -> Iterator[T]:
        while news:
            with loop.lock:  # another thread may be making a step
                event = news.pop(next(iter(news)))
                item = emit(event.completion, event.text)
            if item is not None:
                yield item

    try:
        while live or more:
            more = more and feed()
            live[:] = [request for request in live if request.live]
            yield from items()
            if live:
                loop.step()
                yield from items()
    except KeyboardInterrupt:
        for request in live:
            loop.abort(request)
        yield from items()
        raise
    finally:
        for request in live:
            loop.cancel(request)
