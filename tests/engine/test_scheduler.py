"""The scheduler alone: no model, no tensors, numbers only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastguide.engine.scheduler import HEADROOM, Scheduler

PLENTY = np.array([10_000])


@dataclass(eq=False)
class Job:
    """A request, a prompt or a sample: whatever the scheduler asks of it."""

    order: tuple[int, int]
    waiting: int = 1
    rows: int = 1
    tokens: int = 10

    @property
    def uses(self) -> np.ndarray:
        return np.array([1])

    def left(self) -> int:
        return self.tokens

    def opening(self) -> np.ndarray:
        return np.array([self.tokens])

    def growth(self, tokens: int) -> np.ndarray:
        return np.array([self.rows * tokens])


def scheduler(max_rows: int = 3, budget: int = 100) -> Scheduler[Job, Job, Job]:
    return Scheduler(max_rows, budget)


def test_requests_come_in_order_and_in_groups_that_fit() -> None:
    queues = scheduler()
    jobs = {"a": Job((0, 0), 2), "b": Job((1, 0), 5), "c": Job((2, 0), 1)}
    queues.waiting.extend(jobs.values())

    def admit() -> list[tuple[str, int]]:
        admitted = []
        while (found := queues.next_request(PLENTY)) is not None:
            job, count = found
            job.waiting -= count
            for _ in range(count):
                queues.run(Job(job.order))
            admitted.append((next(n for n, j in jobs.items() if j is job), count))
        return admitted

    assert admit() == [("a", 2), ("b", 1)]
    assert admit() == []
    del queues.running[:2]
    assert admit() == [("b", 2)]
    queues.running.clear()
    assert admit() == [("b", 2), ("c", 1)]
    assert not queues.idle
    queues.running.clear()
    assert admit() == []
    assert queues.idle


def test_nobody_starts_without_slots_for_some_tokens_and_nobody_overtakes() -> None:
    queues = scheduler(max_rows=8)
    queues.waiting.extend([Job((0, 0), tokens=30), Job((1, 0), tokens=1)])
    free = np.array([30 + HEADROOM - 1])
    queues.run(Job((-1, 0), rows=0))
    assert queues.next_request(free) is None
    assert queues.next_request(free + 1) == (queues.waiting[0], 1)
    queues.running.clear()
    assert queues.next_request(free) == (queues.waiting[0], 1)  # alone, it gets all there is
    waits = Job((-2, 0), tokens=50)
    queues.preempt(waits)
    assert queues.next_request(PLENTY) is None  # who was pre-empted comes first
    assert queues.next_sample(PLENTY) is waits


def test_as_many_samples_as_there_are_slots_for() -> None:
    queues = scheduler(max_rows=8)
    queues.waiting.append(Job((0, 0), waiting=8, tokens=20))
    found = queues.next_request(np.array([20 + 3 * HEADROOM + 5]))
    assert found == (queues.waiting[0], 3)


def test_chunks_keep_to_the_budget_and_leave_the_next_tokens_slots() -> None:
    queues = scheduler(budget=25)
    long, short = Job((0, 0), tokens=18), Job((1, 0), tokens=18)
    queues.fill(short)
    queues.fill(long)
    assert queues.chunks(PLENTY) == [(long, 18), (short, 7)]
    for i in range(4):
        queues.run(Job((9, i)))
    assert queues.chunks(np.array([10])) == [(long, 6)]
    assert queues.chunks(np.array([4])) == []
    assert not queues.short(np.array([4]))
    assert queues.short(np.array([3]))
    done = Job((2, 0), tokens=0)
    queues.fill(done)
    assert queues.chunks(np.array([4])) == [(done, 0)]


def test_the_last_makes_room() -> None:
    queues = scheduler()
    early, late = Job((0, 0)), Job((1, 1))
    queues.run(late)
    queues.run(early)
    assert queues.last() is late
    queues.preempt(late)
    assert queues.last() is early
    queues.fill(Job((1, 0)))
    assert queues.last() is queues.filling[0]
    first = Job((0, 1))
    queues.preempt(first)
    assert queues.preempted == [first, late]
