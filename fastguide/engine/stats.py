"""What an engine is doing: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStats:
    """The KV cache of one model, in slots: places for one token each.

    Attributes:
        capacity: all there are.
        in_use: those that samples own, or prompts that are being computed.
        cached: those that only prefixes of earlier requests are in; they go when slots run short.
        reused: tokens, so far, that were found in the cache and not computed again.
    """

    capacity: int
    in_use: int
    cached: int
    reused: int


@dataclass(frozen=True)
class EngineStats:
    """Counts of an engine; the totals are since it was loaded.

    Attributes:
        running: samples that get a token at each step.
        filling: samples whose prompt is being computed.
        waiting: samples that have yet to start, and those that were pre-empted.
        caches: by model: ``model`` is the policy, guides have their names.
        preemptions: how often a sample had to give its slots back and start again, in all.
        steps: in all.
        tokens: that samples got, in all.
        ways: steps by the way that they went: ``unguided``, ``two-phase``, ``one-pass`` or
            ``trunk`` (see ``fastguide.engine.ways``).
    """

    running: int
    filling: int
    waiting: int
    caches: dict[str, CacheStats]
    preemptions: int
    steps: int
    tokens: int
    ways: dict[str, int]

    @property
    def prefix_hits(self) -> int:
        """Tokens, in all models, that were found in the cache and not computed again."""
        return sum(cache.reused for cache in self.caches.values())
