"""Engines on many GPUs or machines: one Ray actor each, behind the calls of a single engine."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastguide.config import Rule
from fastguide.engine import AsyncEngine, Engine, EngineStats
from fastguide.engine.calls import check_errors, gather
from fastguide.engine.requests import per_prompt
from fastguide.engine.text import Prompt, as_prompts
from fastguide.guides import Guide
from fastguide.request import Completion, GenerationError, Piece, SamplingParams

DEATHS = 3
"""A prompt on which so many replicas died is given up; it runs alone before the last of them, as it
may be another one that kills them."""

AHEAD = 2
"""Samples that a replica is given, times those that it decodes at once: its queue is never dry."""


def connected() -> Any:
    """``ray``, connected to the cluster of its environment, else to one on this machine.

    Raises:
        ImportError: naming what to install.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("this needs Ray: pip install 'fastguide[ray]'") from error
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    return ray


class Replicas:
    """Several engines with the same models; each prompt goes to the one that has least to do.

    >>> with Replicas("path", {"cheerful": ValueGuide("path")}, replicas=8) as engines:
    ...     outputs = engines.generate(prompts, VAS(beta=4.0))

    A replica that dies is started again, and its unfinished prompts go to the others. Seeds mean
    what they mean in one engine, so where a prompt runs does not show in its completions.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        guides: Mapping[str, Guide] | None = None,
        *,
        replicas: int = 1,
        gpus: float | None = None,
        cpus: float = 1,
        restarts: int = 2,
        **options: Any,
    ) -> None:
        """Start the replicas, and wait until they have loaded.

        Args:
            model: as in ``Engine``; a path is the same on every machine.
            guides: as in ``Engine``.
            replicas: engines.
            gpus: of each; None is 1 where the cluster has any, and 0 is the CPU.
            cpus: of each.
            restarts: how often each is started again when it dies.
            options: further arguments of ``Engine``, such as ``dtype``.

        Raises:
            ValueError: as ``Engine``; for other numbers of replicas; and if the cluster cannot
                have so many at once.
            ImportError: Ray is not installed.
        """
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1:
            raise ValueError(f"replicas is {replicas!r}; allowed are whole numbers from 1")
        self._ray = ray = connected()
        there = ray.cluster_resources()
        if gpus is None:
            gpus = 1.0 if there.get("GPU") else 0.0
        for name, each in (("CPU", cpus), ("GPU", gpus)):
            if each * replicas > there.get(name, 0):
                raise ValueError(
                    f"replicas is {replicas} with {each:g} {name}s each; the cluster has "
                    f"{there.get(name, 0):g}"
                )
        if not gpus:
            options = {"device": "cpu"} | options
        start = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=restarts, max_concurrency=_CALLS
        )(_Engine)
        path = None if model is None else str(model)
        self._replicas = [_Replica(start.remote(path, guides, options)) for _ in range(replicas)]
        try:
            for replica in self._replicas:
                replica.most = AHEAD * ray.get(replica.actor.max_rows.remote())
        except BaseException as error:
            self.close()
            raise getattr(error, "cause", error) from None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        rule: Rule | Sequence[Rule | None] | None = None,
        weights: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        errors: str = "raise",
        progress: bool | None = None,
    ) -> list[Completion]:
        """As ``Engine.generate``; of an interrupted call, only what had ended is kept."""
        check_errors(errors)
        listed = as_prompts(prompts)
        samplings = per_prompt("sampling", sampling, len(listed))
        total = sum(getattr(s, "n", 1) for s in samplings)
        return gather(self.completions(listed, rule, weights, samplings), total, errors, progress)

    def completions(
        self,
        prompts: Prompt | Sequence[Prompt],
        rule: Rule | Sequence[Rule | None] | None = None,
        weights: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[Completion, None, None]:
        """Completions as their prompts finish, in no fixed order; arguments as in ``generate``."""
        listed = as_prompts(prompts)
        columns = [
            per_prompt(name, value, len(listed))
            for name, value in (("rule", rule), ("weights", weights), ("sampling", sampling))
        ]
        jobs = [_Job(i, row) for i, row in enumerate(zip(listed, *columns, strict=True))]
        return self._run(jobs)

    def stream(
        self,
        prompt: Prompt,
        rule: Rule | None = None,
        weights: Mapping[str, float] | None = None,
        sampling: SamplingParams | None = None,
    ) -> Generator[Piece, None, None]:
        """As ``Engine.stream``; should its replica die meanwhile, Ray's error is raised."""
        while (replica := self._freest()) is None:
            returning = [r for r in self._replicas if r.back is not None]
            if not returning:
                raise RuntimeError(_NONE_LEFT)
            self._is_back(returning[0])
        replica.load += 1
        failed: list[Completion] = []
        pieces = replica.actor.stream.remote(prompt, rule, weights, sampling)
        try:
            for reference in pieces:
                piece = self._ray.get(reference)
                if piece.completion is not None and piece.completion.finish_reason == "error":
                    failed.append(piece.completion)
                yield piece
        finally:
            replica.load -= 1
            self._ray.cancel(pieces)
        if failed:
            raise GenerationError(failed)

    @property
    def stats(self) -> list[EngineStats]:
        """What each replica runs and holds; those that are being started again are left out."""
        asked = [r.actor.stats.remote() for r in self._replicas if r.alive and r.back is None]
        found: list[EngineStats] = self._ray.get(asked)
        return found

    def close(self) -> None:
        """Stop all replicas, and give their GPUs back."""
        for replica in self._replicas:
            self._ray.kill(replica.actor)
            replica.alive = False

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _freest(self) -> _Replica | None:
        there = [replica for replica in self._replicas if replica.alive and replica.back is None]
        return min(there, key=lambda replica: replica.load, default=None)

    def _run(self, jobs: Sequence[_Job]) -> Generator[Completion, None, None]:
        """Hand jobs out as replicas get free; those of a replica that dies are handed out again."""
        waiting = deque(jobs)
        flying: dict[Any, tuple[_Job, _Replica]] = {}
        try:
            while waiting or flying:
                self._hand_out(waiting, flying)
                returning = {r.back: r for r in self._replicas if r.back is not None}
                if not (flying or returning):
                    for job in waiting:
                        yield job.failed(_NONE_LEFT)
                    return
                awaited = [*flying, *returning]
                (reference, *_), _ = self._ray.wait(awaited, num_returns=1)
                if reference in returning:
                    self._is_back(returning[reference])
                    continue
                job, replica = flying.pop(reference)
                replica.load -= job.weight
                yield from self._landed(reference, job, replica, waiting)
            for replica in self._replicas:  # those that nobody had to wait for
                if replica.back is not None and self._ray.wait([replica.back], timeout=0)[0]:
                    self._is_back(replica)
        finally:
            for reference, (job, replica) in flying.items():
                replica.load -= job.weight
                self._ray.cancel(reference)

    def _hand_out(self, waiting: deque[_Job], flying: dict[Any, tuple[_Job, _Replica]]) -> None:
        while waiting:
            replica, job = self._freest(), waiting[0]
            alone = job.deaths >= DEATHS - 1  # its neighbours must not die of it once more
            if replica is None or replica.load >= (1 if alone else replica.most):
                return
            waiting.popleft()
            job.weight = replica.most if alone else job.samples
            replica.load += job.weight
            flying[replica.actor.complete.remote(job.index, *job.arguments)] = job, replica

    def _landed(
        self, reference: Any, job: _Job, replica: _Replica, waiting: deque[_Job]
    ) -> Generator[Completion, None, None]:
        """The completions of a job; where its replica died, it waits again instead."""
        try:
            for done in self._ray.get(reference):
                if done.error is not None and not done.error.startswith(f"prompt {job.index}"):
                    done.error = f"prompt {job.index}: {done.error}"
                yield done
        except self._ray.exceptions.RayActorError as error:
            if replica.back is None:
                replica.back = replica.actor.ready.remote()
            job.deaths += 1
            if job.deaths < DEATHS:
                waiting.appendleft(job)
            else:
                reason = str(error).strip().splitlines()[0]
                yield job.failed(f"{job.deaths} replicas died with it, the last one: {reason}")
        except self._ray.exceptions.RayTaskError as error:
            yield job.failed(str(error.cause))

    def _is_back(self, replica: _Replica) -> None:
        try:
            self._ray.get(replica.back)
        except self._ray.exceptions.ActorUnavailableError:  # it is not even being loaded yet
            time.sleep(PAUSE)
            replica.back = replica.actor.ready.remote()
            return
        except self._ray.exceptions.RayError:  # it has died for good, or cannot load any more
            replica.alive = False
        replica.back = None


PAUSE = 0.5
"""Seconds between two questions whether a replica runs again."""

_CALLS = 10_000
"""Calls that an actor has open at once: each waits for its completions."""

_NONE_LEFT = "no replica is left: all have died, and were started again as often as allowed"


@dataclass(eq=False)
class _Replica:
    """An actor as its callers see it."""

    actor: Any
    load: int = 0
    """Samples that it was given and has not ended."""
    most: int = 1
    """Samples that it is given at once."""
    back: Any = None
    """Ready when it has been started again; None unless it died."""
    alive: bool = True


@dataclass(eq=False)
class _Job:
    """A prompt with its rule, weights and sampling."""

    index: int
    arguments: tuple[Any, ...]
    deaths: int = 0
    """Replicas that died while they had it."""
    weight: int = 0
    """What it adds to the load of the replica that has it."""

    @property
    def samples(self) -> int:
        return getattr(self.arguments[-1], "n", 1)

    def failed(self, reason: str) -> Completion:
        error = f"prompt {self.index}: {reason}"
        return Completion(self.index, 0, finish_reason="error", error=error)


class _Engine:
    """What runs in an actor."""

    def __init__(
        self, model: str | None, guides: Mapping[str, Guide] | None, options: dict[str, Any]
    ) -> None:
        self._loaded: AsyncEngine | Exception
        try:
            self._loaded = AsyncEngine(Engine(model, guides, **options))
        except Exception as error:  # to be raised where somebody asks, in full
            self._loaded = error

    @property
    def _engine(self) -> AsyncEngine:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded

    async def max_rows(self) -> int:
        return self._engine.engine.max_rows

    async def complete(self, index: int, *arguments: Any) -> list[Completion]:
        return await self._engine.generate(*arguments, errors="return", index=index)

    async def stream(self, *arguments: Any) -> AsyncGenerator[Piece, None]:
        async for piece in self._engine.submit(*arguments).pieces():
            yield piece

    async def stats(self) -> EngineStats:
        return self._engine.stats

    async def ready(self) -> None:
        """Answers once the actor has loaded."""
        _ = self._engine
