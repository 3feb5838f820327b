"""An engine in several processes, each with a part of the policy: rank 0 leads, the rest follow.

``torchrun`` starts the processes, and transformers' tensor parallel plan shares the weights out.
All ranks keep the same queues and caches: a loop's steps depend on nothing but what came in between
them, so rank 0 tells the others that, and they make the same steps.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from fastguide.engine.loop import Loop
from fastguide.engine.samples import Event, Request

T = TypeVar("T")

PATIENCE = timedelta(days=365)
"""How long a rank waits for orders: an engine may have nothing to do for long."""


_led = False
"""Whether this process leads an engine."""


def check_launch(device: object) -> None:
    """Refuse to share a policy out where no ranks were started, or where they are not to be.

    Raises:
        ValueError: saying how to start them; also for a second engine, whose ranks would never
            meet: the others follow the first.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "tensor_parallel is True, but this is no process of torchrun; allowed is a launch like "
            "torchrun --nproc-per-node 2 program.py"
        )
    if device is not None:
        raise ValueError(
            f"device is {device!r} and tensor_parallel is True; allowed is None: "
            "each rank takes the device of its own number"
        )
    if _led:
        raise ValueError(
            "a launch of torchrun has one engine with tensor_parallel; this is another"
        )


class Ranks:
    """The processes of one launch; to be made once the policy is loaded."""

    def __init__(self) -> None:
        # Orders go through the host, whatever the models' own exchange goes through.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        global _led
        self.leads = _led = dist.get_rank() == 0
        """Whether this is rank 0."""

    def same(self, value: T) -> T:
        """What rank 0 has."""
        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0, group=self._group)
        return held[0]

    def least(self, value: int) -> int:
        """The smallest of all ranks' numbers."""
        held: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(held, value, group=self._group)
        return min(held)


class LeadingLoop(Loop):
    """The loop of rank 0: before each step the others are told what came in since the last one."""

    def __init__(self, *args: Any, ranks: Ranks, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranks = ranks
        self._orders: list[tuple[str, Any]] = []
        self._nested = False
        atexit.register(self._dismiss)

    def add(self, request: Request) -> None:
        """As ``Loop.add``."""
        bare = dataclasses.replace(request, news={}, told=[], samples=[])
        with self._ordering("add", bare):
            super().add(request)

    def cancel(self, request: Request) -> None:
        """As ``Loop.cancel``."""
        with self._ordering("cancel", request.order):
            super().cancel(request)

    def abort(self, request: Request) -> None:
        """As ``Loop.abort``."""
        with self._ordering("abort", request.order):
            super().abort(request)

    def forget(self) -> None:
        """As ``Loop.forget``."""
        with self._ordering("forget", None):
            super().forget()

    def step(self) -> list[Event]:
        """As ``Loop.step``, in all ranks."""
        with self.lock:
            orders = [*self._orders, ("step", self.scheduler.max_rows)]
            self._orders.clear()
            self._ranks.same(orders)
            return super().step()

    @contextlib.contextmanager
    def _ordering(self, name: str, what: Any) -> Iterator[None]:
        """Note an order, but for those that another one brings about."""
        with self.lock:
            outer, self._nested = self._nested, True
            if not outer:
                self._orders.append((name, what))
            try:
                yield
            finally:
                self._nested = outer

    def _dismiss(self) -> None:
        """Let the other ranks end."""
        with contextlib.suppress(Exception):  # they may have gone, or the group with them
            self._ranks.same([("end", None)])
            dist.destroy_process_group()


def follow(loop: Loop, ranks: Ranks) -> NoReturn:
    """Do what rank 0 does, until it ends; then end this process, too."""
    requests: dict[tuple[int, int], Request] = {}
    while True:
        empty: list[tuple[str, Any]] = []
        for name, what in ranks.same(empty):
            if name == "add":
                loop.add(what)
                requests[what.order] = what
            elif name in ("cancel", "abort"):
                if what in requests:  # else it had not been added
                    getattr(loop, name)(requests[what])
            elif name == "forget":
                loop.forget()
            elif name == "end":
                dist.destroy_process_group()
                raise SystemExit(0)
            else:
                loop.scheduler.max_rows = what
                # What goes wrong goes wrong on rank 0, too, where somebody is told.
                with contextlib.suppress(Exception):
                    loop.step()
                for request in requests.values():
                    request.news.clear()
                requests = {order: r for order, r in requests.items() if r.live}
