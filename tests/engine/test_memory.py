"""How large the caches are: what is asked for, or what is free and of use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastguide import Engine, GenerationError, Plain
from fastguide.engine import caches, engine as engine_module
from fastguide.engine.caches import CPU_MOST, reserve

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (0, "kv_memory is 0; allowed are a whole number of bytes, a fraction of the free memory"),
        (True, "kv_memory is True"),
        (1.5, "kv_memory is 1.5"),
        ("1GB", "kv_memory is '1GB'"),
        (
            100,
            r"caches of 1 model\(s\) have room for no token: they take 512 bytes a token on cpu",
        ),
        (1 << 60, r"no memory for caches of 2,251,799,813,685,248 tokens, 1,073,741,824.00 GiB"),
    ],
)
def test_memory_that_cannot_be_had(tiny: str, memory: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Engine(tiny, guides={}, kv_memory=memory, dtype="float32")
    assert "\n" not in str(caught.value)


def test_a_part_of_the_free_memory(tiny: str) -> None:
    engine = Engine(tiny, guides={}, kv_memory=0.0001, dtype="float32")
    assert engine.stats.caches["model"].capacity > 100
    with pytest.raises(GenerationError, match="a smaller max_tokens"):
        Engine(tiny, guides={}, kv_memory=50 * 512, dtype="float32").generate([[1] * 60])


class Pools:
    """Stands in for the caches of models whose tokens take a MiB."""

    names = ("model",)

    def __init__(self, *devices: str) -> None:
        self._devices = devices

    def slot_bytes(self) -> dict[torch.device, int]:
        return {torch.device(device): 1 << 20 for device in self._devices}

    def reserve(self, slots: int, prefixes: bool) -> None:
        self.slots = slots


@pytest.mark.parametrize(
    ("device", "free", "memory", "most", "slots"),
    [
        ("cuda", 100 * GIB, None, None, 92_160),  # 0.9 of it
        ("cuda", 100 * GIB, None, 1000, 2000),  # twice what is of any use
        ("cuda", 100 * GIB, 0.5, 1000, 51_200),  # who asks for memory gets it
        ("cuda", 100 * GIB, 3 * GIB, None, 3072),
        ("cpu", 4 * GIB, None, None, 2048),
        ("cpu", 100 * GIB, None, None, CPU_MOST >> 20),
        ("cpu", 100 * GIB, 0.5, None, 51_200),
    ],
)
def test_sizes(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    free: int,
    memory: Any,
    most: int | None,
    slots: int,
) -> None:
    monkeypatch.setattr(caches, "free_bytes", lambda device: free)
    pools = Pools(device)
    reserve(pools, memory, most)  # type: ignore[arg-type]
    assert pools.slots == slots


def test_the_device_with_least_room_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pools have the same number of slots: a sequence has one for each token in every model."""
    free = {"cuda:0": 10 * GIB, "cuda:1": 4 * GIB}
    monkeypatch.setattr(caches, "free_bytes", lambda device: free[str(device)])
    pools = Pools(*free)
    reserve(pools, 0.5, None)  # type: ignore[arg-type]
    assert pools.slots == 2048
    reserve(pools, 6 * GIB, None)  # type: ignore[arg-type]
    assert pools.slots == 3072  # bytes are those of all pools together


def test_weights_that_do_not_fit(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(engine_module, "load_policy", full)
    with pytest.raises(ValueError, match="the weights of the model and 0 guides do not fit") as e:
        Engine(tiny, guides={})
    assert "2.00 GiB" in str(e.value)
    assert "\n" not in str(e.value)


def test_memory_is_touched_as_it_is_used(tiny: str) -> None:
    """Slots that were used before go first, so that memory does not spread."""
    engine = Engine(tiny, guides={}, dtype="float32", prefix_cache=False)
    pool = engine.loop.caches.pools[0]
    for _ in range(5):
        engine.generate([[1, 2, 3]], Plain(), None, None)
    highest = pool.slots._fresh
    assert highest <= 3 + 128
