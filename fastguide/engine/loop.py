"""The decode loop: requests go in at any time, each step moves all of them on.

One loop serves all callers of an engine. Each of them finds its news in ``Request.news``,
whoever makes the steps; ``step`` also returns them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerBase

from fastguide.engine.caches import Caches
from fastguide.engine.runner import ModelRunner
from fastguide.engine.samples import Event, Prefill, Request, Sample
from fastguide.engine.scheduler import Scheduler
from fastguide.engine.stats import CacheStats, EngineStats
from fastguide.models.loading import one_line


class Loop:
    """Owns the running samples, the scheduler that orders them and the runner that steps them.

    Methods may be called from any thread; each waits for a step that is being made.
    """

    def __init__(
        self,
        runner: ModelRunner,
        caches: Caches,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Iterable[int],
        *,
        max_rows: int,
        prefill_tokens: int,
    ) -> None:
        """Put a loop around a runner.

        Args:
            runner: opens and steps rows.
            caches: of its models.
            tokenizer: decodes texts.
            end_tokens: those that end a response.
            max_rows: most samples at once; the others wait.
            prefill_tokens: most prompt tokens that one step computes in each model.
        """
        self.runner = runner
        self.caches = caches
        self.tokenizer = tokenizer
        self.end_tokens = frozenset(end_tokens)
        self.scheduler: Scheduler[Request, Prefill, Sample] = Scheduler(max_rows, prefill_tokens)
        self.lock = threading.RLock()
        self._arrived = self._steps = self._tokens = self._preemptions = 0
        self._live: set[Request] = set()
        self._told: list[Event] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.idle

    def add(self, request: Request) -> None:
        """Queue a request. One that the caches can never hold is refused: it finds that as news."""
        with self.lock:
            self._arrived += 1
            request.enter(self.caches, self._arrived, self._told)
            if (reason := request.unfit()) is not None:
                request.refuse(reason)
            else:
                self._live.add(request)
                self.scheduler.waiting.append(request)

    def step(self) -> list[Event]:
        """Admit what fits, compute some of the prompts, and give every running sample a token.

        Returns:
            the news of this step, in the order of arrival.

        Raises:
            Exception: what the models raise that cannot be blamed on one request. Every sample
                then goes on from the tokens it has, unless it is cancelled.
        """
        with self.lock:
            self._steps += 1
            self._told.clear()
            try:
                self._admit()
                self._fill()
                self._decode()
            except BaseException:
                self._recover()
                raise
            for event in self._told:
                if event.request is not None and not event.request.live:
                    self._live.discard(event.request)
            return list(self._told)

    def cancel(self, request: Request) -> None:
        """End a request at once, without news: its slots are free when this returns."""
        with self.lock:
            queues = self.scheduler
            if request in queues.waiting:
                queues.waiting.remove(request)
            for work in [w for w in queues.filling if w.request is request]:
                queues.filling.remove(work)
                work.row.publish()
                work.row.close()
            for sample in list(request.samples):
                self._leave(sample)
                sample.release()
            request.samples.clear()
            request.drop_stem()
            request.filling = 0
            request.refused = request.refused or "cancelled"
            self._live.discard(request)

    def abort(self, request: Request) -> None:
        """End a request; the samples that have started are news, with the tokens they have."""
        with self.lock:
            for sample in list(request.samples):
                self._leave(sample)
                sample.finish("aborted")
            self.cancel(request)

    def forget(self) -> None:
        """Forget the prefixes of earlier requests: only what runs keeps slots."""
        with self.lock:
            self.caches.clear()

    def close(self) -> None:
        """Cancel everything, and forget all prefixes: every slot is free afterwards."""
        with self.lock:
            for request in list(self._live):
                self.cancel(request)
            self.forget()

    @property
    def stats(self) -> EngineStats:
        """Counts of this moment."""
        queues = self.scheduler
        pools = zip(self.caches.names, self.caches.pools, strict=True)
        return EngineStats(
            running=len(queues.running),
            filling=sum(work.rows for work in queues.filling),
            waiting=sum(r.waiting for r in list(queues.waiting)) + len(queues.preempted),
            caches={
                name: CacheStats(p.slots.capacity, p.slots.in_use, p.slots.idle, p.reused)
                for name, p in pools
            },
            preemptions=self._preemptions,
            steps=self._steps,
            tokens=self._tokens,
            ways=dict(self.runner.ways.taken),
        )

    def _admit(self) -> None:
        """Open rows for samples that there is room for; they fill the caches from now on."""
        queues = self.scheduler
        while (sample := queues.next_sample(self.caches.free())) is not None:
            try:
                (row,) = self.runner.open([sample.spec])
            except torch.OutOfMemoryError:
                queues.preempt(sample)
                raise
            except Exception as error:
                self._fail(sample, one_line(error))
                continue
            queues.fill(Prefill(sample.request, row, 1, sample.order, sample))
        while (found := queues.next_request(self.caches.free())) is not None:
            request, count = found
            if request.stem is not None:
                self._start(request, count, time.perf_counter())
                continue
            underway = [w for w in queues.filling if w.request is request and not w.sample]
            if underway:
                underway[0].rows += count
                request.filling += count
                continue
            try:
                (row,) = self.runner.open([request.prompt])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                request.refuse(one_line(error))
                continue
            request.filling += count
            queues.fill(Prefill(request, row, count, (request.order[0], request.begun)))

    def _fill(self) -> None:
        """Compute as much of the prompts as one step may; start the samples of those done."""
        queues = self.scheduler
        if not queues.filling:
            return
        chunks = queues.chunks(self.caches.free())
        if not chunks and not queues.running:  # they are in each other's way
            self._make_way()
            chunks = queues.chunks(self.caches.free())
        rows = [work.row for work, _ in chunks]
        if rows:
            self.runner.prefill(rows, [work.row.computed + count for work, count in chunks])
        for work, _ in chunks:
            if work.row.error is not None or work.row.ready:
                queues.filling.remove(work)
                self._filled(work)

    def _filled(self, work: Prefill) -> None:
        """A prompt is computed, or has failed: start its samples."""
        request, sample, row = work.request, work.sample, work.row
        if sample is not None:
            if row.error is not None:
                row.close()
                self._fail(sample, row.error)
            else:
                sample.row = row
                self.scheduler.run(sample)
            return
        request.filling -= work.rows
        if row.error is not None:
            row.close()
            request.refuse(row.error)
        else:
            row.publish()
            request.stem = row
            self._start(request, work.rows, work.started)

    def _start(self, request: Request, count: int, started: float) -> None:
        """Fork samples off a prompt that is computed."""
        for _ in range(count):
            try:
                sample = request.start(self.tokenizer, started)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                request.refuse(one_line(error))
                return
            self.scheduler.run(sample)

    def _decode(self) -> None:
        """One token for every running sample; ends those that are complete or have failed."""
        queues = self.scheduler
        while queues.running and queues.short(self.caches.free()):
            self._make_way()
        samples = list(queues.running)
        if not samples:
            return
        rows = [sample.row for sample in samples if sample.row is not None]
        step, scores = self.runner.step(rows)
        for i, (sample, row) in enumerate(zip(samples, rows, strict=True)):
            if row.error is not None:
                queues.running.remove(sample)
                self._fail(sample, row.error)
                continue
            if step.tokens[i] < 0:
                continue
            self._tokens += 1
            reason = sample.take(step, i, scores[i], self.end_tokens)
            if reason is None:
                sample.request.tell(sample.completion, sample.text)
            else:
                queues.running.remove(sample)
                sample.finish(reason)

    def _make_way(self) -> None:
        """Free slots: of a prompt whose samples wait, else of what came last.

        Whoever is alone and still short of slots fails: nobody else holds any.
        """
        queues = self.scheduler
        for request in queues.waiting:
            if request.stem is not None:
                request.drop_stem()
                return
        last = queues.last()
        assert last is not None
        if len(queues.running) + len(queues.filling) == 1:
            self._give_up(last, "no slots are left: sequences outside of the engine hold them")
        elif isinstance(last, Sample):
            self._preempt(last)
        else:
            queues.filling.remove(last)
            last.row.publish()
            last.row.close()
            if last.sample is not None:
                self._preempt(last.sample)
            else:
                last.request.filling -= last.rows
                queues.return_request(last.request)

    def _give_up(self, work: Prefill | Sample, reason: str) -> None:
        if isinstance(work, Sample):
            self._leave(work)
            self._fail(work, reason)
            return
        self.scheduler.filling.remove(work)
        work.row.error = reason
        self._filled(work)

    def _preempt(self, sample: Sample) -> None:
        self._preemptions += 1
        sample.release()
        self.scheduler.preempt(sample)

    def _recover(self) -> None:
        """After a step that broke off: rows may be anywhere, so compute them again from tokens."""
        queues = self.scheduler
        for work in queues.filling:
            work.row.close()
        queues.filling.clear()
        queues.running.clear()
        for request in self._live:
            request.filling = 0
            request.drop_stem(publish=False)
            for sample in list(request.samples):
                sample.release(publish=False)
                reason = sample.completion.finish_reason
                if reason is not None:  # it was just ending
                    sample.finish(reason, sample.completion.error)
                elif sample not in queues.preempted:
                    queues.preempt(sample)
        self._live = {request for request in self._live if request.live}
        waiting = [request for request in self._live if request.waiting]
        queues.waiting = deque(sorted(waiting, key=lambda request: request.order))

    def _fail(self, sample: Sample, reason: str) -> None:
        where = f"prompt {sample.request.index}, sample {sample.completion.sample}: "
        sample.finish("error", where + reason)

    def _leave(self, sample: Sample) -> None:
        """Take a sample out of every queue."""
        queues = self.scheduler
        for queue in (queues.running, queues.preempted):
            if sample in queue:
                queue.remove(sample)
        for work in [w for w in queues.filling if w.sample is sample]:
            queues.filling.remove(work)
            work.row.close()
