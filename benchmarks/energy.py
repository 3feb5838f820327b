"""Joules that a device takes, where it tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def joules(step: Callable[[], object], count: int, device: str) -> float | None:
    """The mean of so many steps, of the CPU's package or of one GPU; None if that is unknown."""
    before = _counter(device)
    if before is None:
        return None
    for _ in range(count):
        step()
    if device != "cpu":
        torch.cuda.synchronize(device)
    after = _counter(device)
    if after is None or after <= before:  # the counter has begun anew
        return None
    return round((after - before) / count, 3)


def _counter(device: str) -> float | None:
    """Joules since some moment."""
    try:
        if device == "cpu":
            return int(RAPL.read_text()) / 1e6
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.device(device).index or 0)
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except Exception:  # no permission, no library, no such counter
        return None
