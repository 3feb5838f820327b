"""Every implementation of the ops, as a fixture: one test-suite runs over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastguide.kernels import native, triton, tuning

CUDA = torch.cuda.is_available()


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    """Work is split between threads, also where other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Implementation:
    """Calls ops on one implementation, on its device, with uninitialised memory full of NaN."""

    name: str
    isa: str = ""

    @property
    def interpreted(self) -> bool:
        """Whether Triton runs as Python: sizes must be small."""
        return self.name == "triton" and not CUDA

    @property
    def most_columns(self) -> int:
        """How many columns the implementation can give."""
        return tuning.MAX_COLUMNS if self.name == "triton" else 2**20

    def size(self, usual: int, interpreted: int) -> int:
        """A size, or the one for Triton's interpreter."""
        return interpreted if self.interpreted else usual

    def __call__(self, op: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """The op's results, on the CPU."""
        arguments = tuple(self._put(a) for a in arguments)
        keywords = {key: self._put(value) for key, value in keywords.items()}
        forced = native.instruction_set(self.isa) if self.isa else nullcontext()
        with forced, _poisoned():
            return _to_cpu(op(*arguments, **keywords, impl=self.name))

    def _put(self, value: Any) -> Any:
        if self.name != "triton" or not CUDA:
            return value
        if isinstance(value, Tensor):  # with the same strides
            count = value.untyped_storage().nbytes() // value.element_size()
            whole = value.as_strided((count,), (1,), 0).cuda()
            return whole.as_strided(value.shape, value.stride(), value.storage_offset())
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self._put, value))
        return value


@contextmanager
def _poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN and extreme integers: a forgotten output cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    cpu = map(_to_cpu, value)
    return type(value)(*cpu) if hasattr(value, "_fields") else tuple(cpu)


ALL = [
    Implementation("reference"),
    *(Implementation("native", isa) for isa in ("avx512", "avx2", "generic")),
    Implementation("triton"),
]


def _name(implementation: Implementation) -> str:
    return "-".join(filter(None, (implementation.name, implementation.isa)))


def _marks(implementation: Implementation) -> list[pytest.MarkDecorator]:
    if implementation.name != "triton":
        return []
    return [pytest.mark.gpu if CUDA else pytest.mark.slow]  # its interpreter takes minutes


@pytest.fixture(
    scope="session", params=[pytest.param(i, id=_name(i), marks=_marks(i)) for i in ALL]
)
def impl(request: pytest.FixtureRequest) -> Implementation:
    """One implementation after the other; what cannot run here is skipped, with the reason."""
    chosen: Implementation = request.param
    if chosen.name == "native":
        if not native.available():
            pytest.skip("the native extension is not built")
        if chosen.isa not in native.ISAS:
            pytest.skip(f"this processor has no {chosen.isa}")
    if chosen.name == "triton" and not triton.available():
        pytest.skip("triton is not installed")
    return chosen
