"""The ops as torch sees them: registration, tracing, choice of implementation, refusals."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastguide import kernels
from fastguide.kernels import TreeLayout, dispatch, native, ops, reference, triton

CUDA = torch.cuda.is_available()


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def arguments(name: str) -> tuple[Any, ...]:
    """Small inputs of an op, ``impl`` left out."""
    torch.manual_seed(0)
    if name == "topk_logsumexp":
        return torch.randn(3, 70), 5, torch.ones(3)
    if name == "sample_tail":
        fraction = torch.tensor([0.5, 0.9, 0.1], dtype=torch.float64)
        return torch.randn(3, 70), torch.ones(3), int32(2, 2, 1), fraction
    if name == "guide_sample":
        logits, ones = torch.randn(3, 70), torch.ones(3)
        top = reference.topk_logsumexp(logits, 6, ones)
        row = (int32(5, 5, 2), int32(0, reference.GREEDY, reference.FILL_DROP))
        numbers = (ones.double(), ones.double(), torch.arange(3), torch.arange(3))
        return logits, ones, *top, torch.randn(2, 3, 6), torch.ones(2, 3).double(), *row, *numbers
    if name == "tree_attention":
        slots, starts, counts = int32(3, 1, 4, 5, 0, 2), int32(0, 4), int32(4, 2)
        layout = (slots, starts, counts, int32(0, 2, 3), int32(2, 2, 1))
        keys, values = torch.randn(7, 2, 16), torch.randn(7, 2, 16)
        return torch.randn(3, 4, 16), keys, values, *layout, int32(2, 3, 1), 4, 2, 0.25, 0, 0.0
    if name == "lora_rows":
        base, x = torch.randn(5, 9), torch.randn(5, 8)
        return base, x, torch.randn(2, 3, 8), torch.randn(2, 9, 3), int32(1, 2, 5)
    mask = torch.ones(2, 6, dtype=torch.bool)
    return torch.randn(2, 6), torch.randn(2, 6), mask, 0.9, 0.5


NAMES = "topk_logsumexp guide_sample sample_tail tree_attention lora_rows td_lambda".split()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_the_op_is_what_it_says_to_torch(impl: Any, name: str, order: str) -> None:
    """Schema (nothing mutated or aliased), shapes without data, tracing with dynamic shapes."""
    device = "cuda" if impl.name == "triton" and CUDA else "cpu"
    given = [a.to(device) if isinstance(a, Tensor) else a for a in arguments(name)]
    if order == "columns":
        if impl.name == "native":
            pytest.skip("the native ops want a stride of 1 along rows")
        given = [_column_major(a) if isinstance(a, Tensor) and a.ndim == 2 else a for a in given]
    op = getattr(torch.ops.fastguide, name).default
    torch.library.opcheck(op, (*given, impl.name))


def _column_major(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_call_gives_the_same(name: str) -> None:
    given = arguments(name)
    if name == "tree_attention":
        query, keys, values, *layout, scaling, window, softcap = given
        given = (query, keys, values, TreeLayout(*layout))
        options = {"scaling": scaling, "window": window, "softcap": softcap}
    elif name == "guide_sample":
        fields = "count mode scale weight seed position".split()
        options, given = dict(zip(fields, given[7:], strict=True)), given[:7]
    else:
        options = {}
    op = getattr(kernels, name)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(*given, **options), op(*given, **options), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_replays_with_new_inputs(name: str) -> None:
    op = getattr(torch.ops.fastguide, name).default
    given = [a.cuda() if isinstance(a, Tensor) else a for a in arguments(name)]
    op(*given, "triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = op(*given, "triton")
    given[0].copy_(torch.randn_like(given[0]))
    graph.replay()
    torch.testing.assert_close(outputs, op(*given, "triton"), rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------- choice


def test_native_is_built_where_it_is_required() -> None:
    if os.environ.get("FASTGUIDE_REQUIRE_NATIVE", "") in ("", "0"):
        pytest.skip("FASTGUIDE_REQUIRE_NATIVE is not set")
    assert native.available()


def test_auto_prefers_native_on_the_cpu_and_falls_back_visibly() -> None:
    contiguous = torch.zeros(2, 10)
    expected = native if native.available() else reference
    assert dispatch.chosen("auto", contiguous) is expected
    assert dispatch.chosen("auto", contiguous.double()) is reference
    assert dispatch.chosen("auto", torch.zeros(10, 2).T) is reference


def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_C", None)
    logits = torch.zeros(1, 4)
    assert dispatch.chosen("auto", logits) is reference
    kernels.topk_logsumexp(logits, 1, torch.ones(1))
    with pytest.raises(ValueError, match=r"not built.*FASTGUIDE_REQUIRE_NATIVE=1 pip install"):
        kernels.topk_logsumexp(logits, 1, torch.ones(1), impl="native")


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (torch.zeros(1, 4, dtype=torch.float64), "float32, bfloat16, float16, not float64"),
        (torch.zeros(4, 2).T, "stride of 1 .*, not 2"),
        (torch.zeros(1, 4, device="meta"), "CPU tensors, not meta"),
    ],
)
def test_a_forced_native_never_falls_back(logits: Tensor, reason: str) -> None:
    if not native.available():
        pytest.skip("the native extension is not built")
    with pytest.raises(ValueError, match=reason):
        dispatch.chosen("native", logits)


def test_a_forced_triton_never_falls_back() -> None:
    if not triton.available():
        pytest.skip("triton is not installed")
    with pytest.raises(ValueError, match="float64"):
        dispatch.chosen("triton", torch.zeros(1, 4).double())
    with pytest.raises(ValueError, match="257"):
        dispatch.chosen("triton", torch.zeros(1, 400), k=258)
    with pytest.raises(ValueError, match="256, not 320"):
        dispatch.chosen("triton", torch.zeros(1, 1, 320), head=320)


def test_a_missing_triton_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = triton._why_not or triton.missing(ImportError("No module named 'triton'"))
    monkeypatch.setattr(triton, "_why_not", reason)
    with pytest.raises(ValueError, match=r"Triton is not installed.*pip install 'fastguide"):
        dispatch.chosen("triton", torch.zeros(1, 4))


def test_only_the_reference_has_gradients() -> None:
    logits, ones = torch.randn(2, 50, requires_grad=True), torch.ones(2)
    _, _, lse = kernels.topk_logsumexp(logits, 5, ones)
    lse.sum().backward()
    torch.testing.assert_close(logits.grad, torch.softmax(logits.detach(), -1))
    with pytest.raises(ValueError, match=r"no gradient: call it under torch.no_grad\(\)"):
        kernels.topk_logsumexp(logits, 5, ones, impl="native")
    with torch.no_grad():
        kernels.topk_logsumexp(logits, 5, ones)


# ----------------------------------------------------------------------------------- refusals


def refusals() -> list[tuple[str, int, Any, str]]:
    """(op, position of the argument, what is wrong with it, what is said)."""
    meta = torch.zeros(3, device="meta")
    return [
        ("topk_logsumexp", 0, torch.zeros(4), r"logits must be \[N, V\].*not \[4\]"),
        ("topk_logsumexp", 0, torch.zeros(3, 0), r"V at least 1, not \[3, 0\]"),
        ("topk_logsumexp", 0, torch.zeros(3, 4).long(), "logits must be float32 .*not int64"),
        ("topk_logsumexp", 1, 0, "k must be at least 1, not 0"),
        ("topk_logsumexp", 2, torch.ones(1), r"inv_temperature must be \[3\], not \[1\]"),
        ("topk_logsumexp", 2, torch.ones(3).double(), "must be float32, not float64"),
        ("topk_logsumexp", 2, meta, "inv_temperature must be on cpu, not on meta"),
        ("guide_sample", 2, torch.zeros(3), r"values must be \[N, K\].*not \[3\]"),
        ("guide_sample", 3, torch.zeros(3, 6).long(), "ids must be int32, not int64"),
        ("guide_sample", 5, torch.zeros(3, 6), r"scores must be \[G, N, K\], not \[3, 6\]"),
        ("guide_sample", 6, torch.zeros(1, 3), r"guide_weights must be \[2, 3\], not \[1, 3\]"),
        ("sample_tail", 3, torch.zeros(3), "fraction must be float64, not float32"),
        ("tree_attention", 0, torch.zeros(3, 5, 16), "multiple of the 2 heads of keys, not 5"),
        ("tree_attention", 1, torch.zeros(7, 2, 8), r"keys must be \[7, 2, 16\], not \[7, 2, 8\]"),
        ("tree_attention", 2, torch.zeros(6, 2, 16), r"values must be \[7, 2, 16\]"),
        ("tree_attention", 3, torch.zeros(6), "layout.slots must be int32, not float32"),
        ("tree_attention", 7, int32(1), r"layout.trunk must be \[3\], not \[1\]"),
        ("tree_attention", 9, 1, r"max_slots must be at least max_rows, 2, not 1"),
        ("tree_attention", 10, 1, r"max_rows must be 2 to 3 for 3 rows of 2 requests, not 1"),
        ("tree_attention", 12, -1, r"window must be at least 0 \(none\), not -1"),
        ("tree_attention", 13, -0.5, r"softcap must be finite.*, not -0.5"),
        ("lora_rows", 2, torch.zeros(2, 3, 7), r"x must be \[5, 7\], not \[5, 8\]"),
        ("lora_rows", 4, int32(0, 5), r"segments must be \[3\], not \[2\]"),
        ("td_lambda", 2, torch.ones(2, 6), "mask must be bool, not float32"),
        ("td_lambda", 3, 1.5, "gamma must be from 0 to 1, not 1.5"),
    ]


@pytest.mark.parametrize(("name", "at", "wrong", "said"), refusals())
def test_wrong_input_gets_one_sentence(name: str, at: int, wrong: Any, said: str) -> None:
    given = list(arguments(name))
    given[at] = wrong
    options: dict[str, Any] = {}
    if name == "tree_attention":
        options = dict(zip(("scaling", "window", "softcap"), given[11:], strict=True))
        given = [*given[:3], TreeLayout(*given[3:11])]
    elif name == "guide_sample":
        fields = "count mode scale weight seed position".split()
        options, given = dict(zip(fields, given[7:], strict=True)), given[:7]
    with pytest.raises(ValueError, match=said):
        getattr(ops, name)(*given, **options)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, reference, native, triton, not 'fast'"):
        kernels.topk_logsumexp(torch.zeros(1, 4), 1, torch.ones(1), impl="fast")


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_native_temperatures_must_be_positive_and_finite(factor: float) -> None:
    if not native.available():
        pytest.skip("the native extension is not built")
    with pytest.raises(ValueError, match=r"positive and finite, not .*\(row 1\)"):
        native.topk_logsumexp(torch.zeros(2, 4), 1, torch.tensor([1.0, factor]))


def broken_layouts() -> list[tuple[dict[str, Tensor], str]]:
    return [
        ({"slots": int32(3, 1, 4, 5, 0, 7)}, "slots"),
        ({"slots": int32(3, 1, -1, 5, 0, 2)}, "slots"),
        ({"slot_starts": int32(0, 5)}, "slot_starts"),
        ({"slot_starts": int32(-1, 4)}, "slot_starts"),
        ({"slot_counts": int32(4, 3)}, "slot_starts"),
        ({"slot_counts": int32(4, -1)}, "slot_starts"),
        ({"row_starts": int32(0, 2, 4)}, "row_starts"),
        ({"row_starts": int32(0, 0, 3)}, "row"),
        ({"trunk": int32(3, 2, 1)}, "trunk"),
        ({"trunk": int32(-1, 2, 1)}, "trunk"),
        ({"branch": int32(2, 4, 1)}, "branch"),
    ]


@pytest.mark.parametrize(("change", "named"), broken_layouts())
def test_a_broken_layout_is_refused_by_the_native_op(change: dict, named: str) -> None:
    if not native.available():
        pytest.skip("the native extension is not built")
    query, keys, values, *layout, scaling, _, _ = arguments("tree_attention")
    broken = TreeLayout(*layout)._replace(**change)
    with pytest.raises(ValueError, match=named):
        kernels.tree_attention(query, keys, values, broken, scaling=scaling, impl="native")


@pytest.mark.parametrize("change", [change for change, _ in broken_layouts()], ids=str)
def test_triton_stays_inside_the_tensors_of_a_broken_layout(
    monkeypatch: pytest.MonkeyPatch, change: dict
) -> None:
    """Around every input lies what would show in the output: NaN, numbers that point far out."""
    if not triton.available():
        pytest.skip("triton is not installed")
    device = "cuda" if CUDA else "cpu"
    query, keys, values, *layout, scaling, _, _ = arguments("tree_attention")
    broken = TreeLayout(*layout)._replace(**change)
    guarded = []

    def within(tensor: Tensor, around: float = float("nan")) -> Tensor:
        """The tensor in the middle of a larger one."""
        around = around if tensor.is_floating_point() else 2**20
        whole = torch.full((3 * tensor.numel() + 64,), around, dtype=tensor.dtype, device=device)
        inner = whole[tensor.numel() + 32 :][: tensor.numel()].view(tensor.shape)
        guarded.append((whole, inner, around))
        inner.copy_(tensor)
        return inner

    def empty(*shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        sizes = shape[0] if isinstance(shape[0], tuple) else shape
        return within(torch.zeros(sizes, dtype=dtype), around=7.0)

    query, keys, values = map(within, (query, keys, values))
    inputs = len(guarded)
    broken = TreeLayout(*map(within, broken[:6]), *broken[6:])
    monkeypatch.setattr(torch, "empty", empty)
    out = triton.tree_attention(query, keys, values, broken, scaling=scaling)
    monkeypatch.undo()
    assert not out.isnan().any()
    for whole, inner, around in guarded[inputs:]:
        inner.fill_(around)
        assert (whole == around).all()
