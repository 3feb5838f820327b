"""The engine in asyncio: requests come and go at any time, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fastguide import VAS, AsyncEngine, Engine, FunctionGuide, GenerationError, SamplingParams

Make = Callable[..., Engine]

PROMPTS = [[(7 * i + 3 * j) % 62 + 1 for j in range(n)] for i, n in enumerate((40, 3, 17, 25))]
LONG = SamplingParams(max_tokens=200, seed=0, ignore_eos=True)


def sampling(i: int) -> SamplingParams:
    return SamplingParams(max_tokens=20, seed=i, n=1 + i % 2, ignore_eos=True)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """A coroutine, which must not hang."""
    return asyncio.run(asyncio.wait_for(work, 60))


def idle(engine: Engine) -> bool:
    return engine.loop.idle and not any(c.in_use for c in engine.stats.caches.values())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def fail(words: list[int]) -> float:
    if 50 in words:
        raise RuntimeError("no 50")
    return 0.0


def test_concurrent_requests_equal_blocking_ones(tiny_engine: Make) -> None:
    engine = tiny_engine()
    rules = [VAS(2.0, 4), None, VAS(-1.0, 3), VAS(4.0, 6)]
    calls = list(zip(PROMPTS, rules, map(sampling, range(4)), strict=True))
    expected = [engine.generate([p], r, None, s) for p, r, s in calls]

    async def stream(served: AsyncEngine, i: int) -> list[str]:
        texts = ["", ""]
        prompt, rule, params = calls[i]
        async for piece in served.stream(prompt, rule, None, params):
            texts[piece.sample] += piece.text
        return texts[: params.n]

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            blocking = [served.generate(p, r, None, s) for p, r, s in calls]
            streams = [stream(served, i) for i in range(4)]
            found = await asyncio.gather(*blocking, *streams)
        assert [[c.token_ids for c in f] for f in found[:4]] == [
            [c.token_ids for c in e] for e in expected
        ]
        assert found[4:] == [[c.text for c in e] for e in expected]

    run(main())
    assert idle(engine)


@pytest.mark.parametrize("how", ["break", "close", "task", "cancel", "submitted"])
def test_who_stops_reading_frees_slots(tiny_engine: Make, how: str) -> None:
    engine = tiny_engine()

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            if how == "task":
                task = asyncio.create_task(served.generate([1, 2], None, None, LONG))
                await until(lambda: engine.stats.tokens > 3)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "cancel":
                stream = served.submit([1, 2], None, None, LONG)
                await until(lambda: engine.stats.tokens > 3)
                served.cancel(stream)
                assert len([piece async for piece in stream]) < 200
            else:
                pieces: Any = (
                    served.submit([1, 2], VAS(1.0), None, LONG)
                    if how == "submitted"
                    else served.stream([1, 2], VAS(1.0), None, LONG)
                )
                async for piece in pieces:
                    if piece.text:
                        break
                if how == "close":
                    await pieces.aclose()
                del pieces
            steps = engine.stats.steps
            await until(lambda: idle(engine))
            assert engine.stats.steps - steps < 30
            assert engine.stats.tokens < 200
            again = await served.generate([1, 2], None, None, sampling(0))
            assert len(again[0].token_ids) == 20

    run(main())


def test_bad_requests_fail_alone(tiny_engine: Make) -> None:
    engine = tiny_engine(240, guides={"f": FunctionGuide(fail, on="tokens")})

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            good = asyncio.create_task(served.generate([1, 2], VAS(1.0, 4), {"g": 1.0}, LONG))
            for arguments, message in [
                (("",), "the prompt is empty"),
                (([1], VAS(1.0), {"x": 1.0}), "unknown guide 'x'"),
                (([1], [VAS(), VAS()]), "rule has 2 entries for 1 prompts"),
                (([1] * 150, None, None, LONG), "a sample needs"),
                (([50], VAS(1.0, 4), {"f": 1.0}), "RuntimeError: no 50"),
            ]:
                with pytest.raises(GenerationError, match=message):
                    await served.generate(*arguments)  # type: ignore[arg-type]
                with pytest.raises(GenerationError, match=message):
                    _ = [piece async for piece in served.stream(*arguments)]  # type: ignore[arg-type]
                (failed,) = await served.generate(*arguments, errors="return")  # type: ignore[arg-type]
                assert failed.finish_reason == "error"
            assert len((await good)[0].token_ids) == 200

    run(main())
    assert idle(engine)


def test_a_step_that_fails_is_told_to_everyone_and_the_engine_goes_on(
    tiny_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    step = engine.runner.step

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            readers = [asyncio.create_task(served.generate([i], None, None, LONG)) for i in (1, 2)]
            await until(lambda: engine.stats.running == 2)

            def broken(rows: Any) -> Any:
                monkeypatch.setattr(engine.runner, "step", step)
                raise MemoryError("no more")

            monkeypatch.setattr(engine.runner, "step", broken)
            for reader in readers:
                with pytest.raises(RuntimeError, match="decoding failed: MemoryError: no more"):
                    await reader
            assert idle(engine)
            assert len(await served.generate([1], None, None, sampling(0))) == 1

    run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_leaves_nobody_waiting(
    tiny_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()

    def dies(rows: Any) -> Any:
        raise SystemExit("gone")

    monkeypatch.setattr(engine.runner, "step", dies)

    async def main() -> None:
        served = AsyncEngine(engine)
        with pytest.raises(RuntimeError, match="the engine broke down: SystemExit: gone"):
            await served.generate([1], None, None, LONG)
        with pytest.raises(RuntimeError, match="the engine broke down: SystemExit: gone"):
            served.submit([1])
        await served.close()

    run(main())
    assert idle(engine)


def test_drain_finishes_what_runs_and_refuses_more(tiny_engine: Make) -> None:
    engine = tiny_engine()

    async def main() -> None:
        served = AsyncEngine(engine)
        early = [served.submit([i], None, None, LONG) for i in (1, 2)]
        draining = asyncio.create_task(served.drain())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="the engine is draining; it takes no more requests"):
            served.submit([1])
        for stream in early:
            (done,) = [p.completion async for p in stream if p.completion]
            assert done.finish_reason == "length"
        await draining
        assert not served._thread.is_alive()

    run(main())
    assert idle(engine)


def test_close_tells_who_waits(tiny_engine: Make) -> None:
    engine = tiny_engine()

    async def main() -> None:
        served = AsyncEngine(engine)
        reader = asyncio.create_task(served.generate([1], None, None, LONG))
        await until(lambda: engine.stats.running == 1)
        await served.close()
        with pytest.raises(RuntimeError, match="the engine is closed; it takes no more requests"):
            await reader

    run(main())
    assert idle(engine)


def test_sigterm_drains(tiny_engine: Make) -> None:
    async def main() -> None:
        served = AsyncEngine(tiny_engine())
        drained = served.drain_on((signal.SIGTERM,))
        reader = asyncio.create_task(served.generate([1], None, None, LONG))
        await until(lambda: served.stats.running == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await drained
        assert (await reader)[0].finish_reason == "length"

    run(main())


def test_direct_calls_join_the_same_batch(tiny_engine: Make) -> None:
    engine = tiny_engine()
    expected = engine.generate([PROMPTS[0]], None, None, sampling(1))

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            task = asyncio.create_task(served.generate([1, 2], None, None, LONG))
            await until(lambda: engine.stats.running == 1)
            found = await asyncio.to_thread(engine.generate, [PROMPTS[0]], None, None, sampling(1))
            assert [c.token_ids for c in found] == [c.token_ids for c in expected]
            assert len((await task)[0].token_ids) == 200

    run(main())
    assert idle(engine)
