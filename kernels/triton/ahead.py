"""Compiles the kernels ahead of time, without a GPU: registers, shared memory, spills.

    python -m fastguide.kernels.triton.ahead --help

The launchers say what there is to compile: they run on tensors without storage, and instead of
launching, the kernels note their arguments. So a row of the table is what a launch with these
shapes compiles. The exit status is 1 if a hot kernel spills registers, or if any kernel needs more
shared memory than the architecture has.
"""

# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import triton
from torch import Tensor, bfloat16, float16, float32, float64, int32, int64
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from fastguide.kernels import tuning
from fastguide.kernels.reference import TreeLayout

from . import attention, lora, returns, sampling, tail, vocabulary

MODULES = (vocabulary, tail, sampling, attention, lora, returns)

DEVICES = {80: (108, 163), 89: (128, 99), 90: (132, 227), 100: (148, 227)}
"""Multiprocessors, and KiB of shared memory that a program can have, by compute capability: of
A100, RTX 4090, H100 and B200."""

SPILLS = 64
"""Bytes of local memory that are no fault: ptxas parks a few numbers there, outside the loops, to
fit one more program into a multiprocessor."""

HOT = (
    "_scan_kernel",
    "_merge_kernel",
    "_guide_sample_kernel",
    "_sample_tail_kernel",
    "_tree_attention_kernel",
    "_lora_rows_kernel",
)
"""Kernels of every step, which may not spill more."""


@dataclass(frozen=True)
class Report:
    """What one kernel takes on one architecture."""

    capability: int
    kernel: str
    launch: str
    warps: int
    registers: int
    shared: int
    stack: int
    """Bytes of local memory per thread: spilled registers."""

    @property
    def fault(self) -> str:
        """What is wrong with it, if anything."""
        if self.stack > SPILLS and self.kernel in HOT:
            return "spills"
        return "shared memory" if self.shared > DEVICES[self.capability][1] * 1024 else ""


# ------------------------------------------------------------------------------- launches


def _tensor(*shape: int, dtype: torch.dtype = float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _topk(rows: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    vocabulary.topk_logsumexp(_tensor(rows, vocab, dtype=dtype), k, _tensor(rows))


def _sample_tail(rows: int, vocab: int, dtype: torch.dtype) -> None:
    count, fraction = _tensor(rows, dtype=int32), _tensor(rows, dtype=float64)
    tail.sample_tail(_tensor(rows, vocab, dtype=dtype), _tensor(rows), count, fraction)


def _guide_sample(rows: int, vocab: int, k: int, guides: int, dtype: torch.dtype) -> None:
    sampling.guide_sample(
        _tensor(rows, vocab, dtype=dtype),
        _tensor(rows),
        _tensor(rows, k),
        _tensor(rows, k, dtype=int32),
        _tensor(rows, dtype=float64),
        _tensor(guides, rows, k),
        _tensor(guides, rows, dtype=float64),
        count=_tensor(rows, dtype=int32),
        mode=_tensor(rows, dtype=int32),
        scale=_tensor(rows, dtype=float64),
        weight=_tensor(rows, dtype=float64),
        seed=_tensor(rows, dtype=int64),
        position=_tensor(rows, dtype=int64),
    )


def _attention(
    requests: int, candidates: int, prefix: int, heads: tuple[int, int], size: int,
    dtype: torch.dtype, window: int = 0, softcap: float = 0.0,
) -> None:  # fmt: skip
    rows, pool, slots = requests * candidates, 100_000, prefix + candidates
    starts, numbers = _tensor(requests + 1, dtype=int32), _tensor(rows, dtype=int32)
    each = _tensor(requests, dtype=int32)
    attention.tree_attention(
        _tensor(rows, heads[0], size, dtype=dtype),
        _tensor(pool, heads[1], size, dtype=dtype),
        _tensor(pool, heads[1], size, dtype=dtype),
        TreeLayout(numbers, each, each, starts, numbers, numbers, slots, candidates),
        scaling=size**-0.5,
        window=window,
        softcap=softcap,
    )


def _lora(rows: int, size: int, rank: int, dtype: torch.dtype) -> None:
    a, b = _tensor(2, rank, size, dtype=dtype), _tensor(2, size, rank, dtype=dtype)
    x = _tensor(rows, size, dtype=dtype)
    lora.lora_rows(x, x, a, b, _tensor(3, dtype=int32))


def _td_lambda(rows: int, length: int, dtype: torch.dtype) -> None:
    values = _tensor(rows, length, dtype=dtype)
    returns.td_lambda(values, values, _tensor(rows, length, dtype=torch.bool), 1.0, 0.95)


def launches(every: bool) -> Iterator[partial[None]]:
    """The launches of the table: the few that matter most, or every kind."""
    yield partial(_topk, 1, 131_072, 21, bfloat16)
    yield partial(_topk, 1024, 32_001, 21, bfloat16)
    yield partial(_guide_sample, 1, 131_072, 21, 2, bfloat16)
    yield partial(_sample_tail, 1, 131_072, float32)
    yield partial(_attention, 8, 20, 4096, (32, 32), 128, bfloat16)
    yield partial(_attention, 8, 20, 4096, (32, 8), 128, bfloat16)
    yield partial(_lora, 40, 4096, 16, bfloat16)
    yield partial(_td_lambda, 64, 512, float32)
    if not every:
        return
    yield partial(_topk, 64, 50_257, 21, float16)
    yield partial(_sample_tail, 1024, 50_257, float16)
    yield partial(_attention, 1, 20, 128, (8, 8), 128, float16)
    for dtype in (float32, bfloat16):
        for rows in (1, 64, 1024):
            yield partial(_topk, rows, 50_257, 21, dtype)
        yield partial(_topk, 1024, 131_072, 21, dtype)
        yield partial(_topk, 1024, 32_000, 2, dtype)
        yield partial(_guide_sample, 1024, 50_257, 21, 1, dtype)
        yield partial(_sample_tail, 1024, 50_257, dtype)
        yield partial(_lora, 40, 4096, 64, dtype)
        yield partial(_lora, 1024, 4096, 256, dtype)
        yield partial(_attention, 1, 20, 128, (8, 8), 128, dtype)
    for rows in (1, 1024):
        yield partial(_topk, rows, 131_072, 257, float32)
        yield partial(_topk, rows, 131_072, 257, bfloat16)
        yield partial(_guide_sample, rows, 131_072, 257, 3, bfloat16)
    for size in (32, 64, 80, 96, 128, 192, 256):
        for group in (1, 2, 4):
            yield partial(_attention, 8, 20, 4096, (8 * group, 8), size, bfloat16)
        yield partial(_attention, 8, 20, 4096, (8, 8), size, float32)
    for size in (64, 128, 256):
        for dtype in (float32, bfloat16):
            yield partial(_attention, 8, 20, 4096, (32, 8), size, dtype, 512, 30.0)
    yield partial(_td_lambda, 64, 3000, bfloat16)


# ---------------------------------------------------------------------------- compilation


@contextmanager
def _noted() -> Iterator[list[tuple[JITFunction, dict[str, Any]]]]:
    """Launches of our kernels note themselves here and do nothing else."""
    calls: list[tuple[JITFunction, dict[str, Any]]] = []
    named = [(name, value) for module in MODULES for name, value in vars(module).items()]
    kernels = [value for name, value in named if name.endswith("_kernel")]

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        calls.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | keywords))

    for kernel in kernels:
        kernel.run = partial(note, kernel)
    try:
        yield calls
    finally:
        for kernel in kernels:
            del kernel.run


def _source(kernel: JITFunction, given: dict[str, Any]) -> ASTSource:
    """Specialised as Triton's launcher does: integers of 1, and alignments to 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        special = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, Tensor) or (special and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _resources(cubin: bytes) -> dict[str, int]:
    """``REG``, ``STACK`` and so on, as cuobjdump, which Triton brings along, tells them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", text)}


def compiled(launch: Callable[[], None], capability: int) -> list[Report]:
    """Compile the kernels of one launch for one architecture, e.g. 90 for sm_90."""
    processors, kibibytes = DEVICES[capability]
    tuning.PROCESSORS, tuning.SHARED_MEMORY = processors, kibibytes * 1024
    with _noted() as calls:
        launch()
    reports = []
    for kernel, given in calls:
        options = {name: value for name, value in given.items() if name not in kernel.arg_names}
        target = GPUTarget("cuda", capability, 32)
        binary = triton.compile(_source(kernel, given), target=target, options=options)
        used = _resources(binary.asm["cubin"])
        reports.append(
            Report(
                capability,
                kernel.__name__,
                _name(launch),
                binary.metadata.num_warps,
                used["REG"],
                binary.metadata.shared,
                used["STACK"] + used["LOCAL"],
            )
        )
    return reports


def _name(launch: Any) -> str:
    arguments = ", ".join(str(a).removeprefix("torch.") for a in launch.args)
    return f"{launch.func.__name__[1:]}({arguments})"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels without a GPU.")
    parser.add_argument("--every", action="store_true", help="every kind of launch; takes minutes")
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90, 100], choices=DEVICES)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, interpreted kernels are not compiled.")
    jobs = [(launch, sm) for sm in arguments.sm for launch in launches(arguments.every)]
    print(f"{'sm':>3}  {'kernel':<22} {'warps':>5} {'regs':>4} {'shared':>7} {'stack':>6}  launch")
    faults = 0
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for reports in pool.map(compiled, *zip(*jobs, strict=True)):
            for r in reports:
                print(
                    f"{r.capability:>3}  {r.kernel:<22} {r.warps:>5} {r.registers:>4} "
                    f"{r.shared:>7} {r.stack:>6}  {r.launch}  {r.fault}",
                    flush=True,
                )
                faults += bool(r.fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
