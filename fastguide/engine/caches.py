"""The KV pools of an engine's models: how large they are, and what requests take of them.

Slots are counted as vectors ``[P]`` int64, one number for each pool, in the order of ``names``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fastguide.cache import CachedSequence
from fastguide.engine.ways import Ways
from fastguide.models.decoder import Decoder
from fastguide.scorer import Scorer, State, TreeScorer

GPU_SHARE = 0.9
"""Of the memory that is free once the models are loaded; passes take the rest."""

CPU_SHARE = 0.5
CPU_MOST = 8 << 30
"""Bytes: a cache on the CPU is not larger than this unless it is asked for."""

SPARE = 2
"""By default the caches hold so many times what the most samples take at full length: half of it
is for prefixes of earlier requests then."""


class Caches:
    """The pools of the policy and of those guides that are decoders, each pool once."""

    def __init__(self, policy: Decoder, scorers: Mapping[str, Scorer], ways: Ways) -> None:
        trees = {
            n: s.decoder
            for n, s in scorers.items()
            if isinstance(s, TreeScorer) and not ways.stateless(n)
        }
        self.decoders = {"model": policy}
        for name, decoder in trees.items():
            if all(decoder.pool is not d.pool for d in self.decoders.values()):
                self.decoders[f"guide {name!r}"] = decoder
        self.names = list(self.decoders)
        self.pools = [decoder.pool for decoder in self.decoders.values()]
        self._of_guide = {
            name: np.array([decoder.pool is pool for pool in self.pools], dtype=np.int64)
            for name, decoder in trees.items()
        }
        self._of_policy = np.array([policy.pool is pool for pool in self.pools], dtype=np.int64)
        self._adapters = {n: s.adapter for n, s in scorers.items() if isinstance(s, TreeScorer)}
        self._read_by_policy = ways.leapers

    def reserve(self, slots: int, prefixes: bool) -> None:
        """Give every pool its size.

        Raises:
            ValueError: there is not so much memory.
        """
        for decoder in self.decoders.values():
            if not decoder.pool.fixed:  # a guide that another engine has loaded, too
                decoder.reserve(slots, prefixes)

    def slot_bytes(self) -> dict[torch.device, int]:
        """Bytes of one token in the pools of each device together."""
        total: dict[torch.device, int] = {}
        for decoder in self.decoders.values():
            total[decoder.device] = total.get(decoder.device, 0) + decoder.slot_bytes()
        return total

    @property
    def capacity(self) -> np.ndarray:
        """Slots of each pool."""
        return np.array([pool.slots.capacity for pool in self.pools])

    def free(self) -> np.ndarray:
        """Slots of each pool that can be had: free ones, and those only prefixes are in."""
        return np.array([pool.available() for pool in self.pools])

    def uses(self, weights: Mapping[str, float]) -> np.ndarray:
        """How many sequences a sample with these guides is in each pool."""
        return self._of_policy + self._guides(weights)

    def scratch(self, weights: Mapping[str, float], k: int) -> np.ndarray:
        """Slots that the candidates of one step take."""
        by_policy = not self._read_by_policy.isdisjoint(weights)
        return k * (self._guides(weights) + by_policy * self._of_policy)

    def opening(self, tokens: Sequence[int], weights: Mapping[str, float]) -> np.ndarray:
        """Slots that a prompt takes, but for those that are in use by others anyway."""
        adapters: list[tuple[np.ndarray, int | None]] = [(self._of_policy, None)]
        adapters += [
            (self._of_guide[name], self._adapters[name])
            for name in weights
            if name in self._of_guide
        ]
        total = np.zeros_like(self._of_policy)
        for place, adapter in adapters:
            pool = self.pools[int(place.argmax())]
            total += place * (len(tokens) - pool.shared(tokens, adapter))
        return total

    def owed(self, states: Mapping[str, State]) -> np.ndarray:
        """Slots of tokens that guides have yet to read, beside the last one of each."""
        late = np.zeros_like(self._of_policy)
        for name, state in states.items():
            if isinstance(state, CachedSequence):
                late += self._of_guide[name] * max(0, len(state) - len(state.slots) - 1)
        return late

    def ahead(self, sequence: CachedSequence, states: Mapping[str, State]) -> np.ndarray:
        """Slots for tokens to come that a sample has already."""
        held = len(sequence.ahead) * self._of_policy
        for name, state in states.items():
            if isinstance(state, CachedSequence):
                held = held + len(state.ahead) * self._of_guide[name]
        return held

    def clear(self) -> None:
        """Forget the prefixes of earlier requests."""
        for pool in self.pools:
            if pool.prefixes is not None:
                pool.prefixes.clear()

    def _guides(self, weights: Mapping[str, float]) -> np.ndarray:
        return sum(
            (self._of_guide[name] for name in weights if name in self._of_guide),
            np.zeros_like(self._of_policy),
        )


def reserve(
    caches: Caches,
    memory: int | float | None,
    most: int | None,
    prefixes: bool = True,
    least: Callable[[int], int] = int,
) -> None:
    """Give the pools of an engine as many slots as there is memory for, the same number to each.

    Args:
        caches: of an engine that has loaded its models.
        memory: bytes for all pools together, or a fraction of what is free on each device; None is
            ``GPU_SHARE`` or ``CPU_SHARE`` of it, and not more than is useful.
        most: slots that the most samples take at full length; None where that has no limit.
        prefixes: keep the prefixes of earlier requests.
        least: of a number of slots here and those elsewhere, where other processes do the same.

    Raises:
        ValueError: memory that cannot be had, or that holds no token.
    """
    each = caches.slot_bytes()
    free = {device: free_bytes(device) for device in each}
    if isinstance(memory, int):
        slots = memory // sum(each.values())
    else:
        slots = min(_wanted(memory, free[device], device) // each[device] for device in each)
    if memory is None and most is not None:
        slots = min(slots, SPARE * most)
    slots = least(slots)
    what = ", and ".join(
        f"{size:,} bytes a token on {device}, where {_gib(free[device])} are free"
        for device, size in each.items()
    )
    if slots < 1:
        raise ValueError(
            f"the caches of {len(caches.names)} model(s) have room for no token: they take {what}"
            + (f"; kv_memory is {memory!r}" if memory is not None else "")
        )
    try:
        caches.reserve(slots, prefixes)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise ValueError(
            f"no memory for caches of {slots:,} tokens, {_gib(slots * sum(each.values()))}: they "
            f"take {what}; a smaller kv_memory may fit"
        ) from error


def _wanted(memory: float | None, free: int, device: torch.device) -> int:
    """Bytes that the pools of a device may take."""
    if memory is not None:
        return int(memory * free)
    return int(free * GPU_SHARE) if device.type == "cuda" else min(int(free * CPU_SHARE), CPU_MOST)


def check_memory(memory: object) -> None:
    """Refuse what is no amount of memory.

    Raises:
        ValueError: naming it and what is allowed.
    """
    number = isinstance(memory, (int, float)) and not isinstance(memory, bool)
    fits = number and (0 < memory < 1 if isinstance(memory, float) else memory >= 1)  # type: ignore[operator]
    if memory is not None and not fits:
        raise ValueError(
            f"kv_memory is {memory!r}; allowed are a whole number of bytes, a fraction of the free "
            "memory above 0 and below 1, and None"
        )


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: what is free, not what there is."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds for later counts as taken otherwise
        return torch.cuda.mem_get_info(device)[0]
    found = [_available()]
    group = Path("/sys/fs/cgroup")  # a container may have less than its machine
    try:
        limit = int((group / "memory.max").read_text())
        found.append(limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(0, min(found))


def _available() -> int:
    """Bytes of memory that the system can give."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:  # not Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return CPU_MOST


def _gib(count: int) -> str:
    return f"{count / (1 << 30):,.2f} GiB"
