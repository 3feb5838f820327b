"""``tree_attention``: every implementation against each row's own softmax, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from fastguide.kernels import TreeLayout, reference, tree_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Request = tuple[int, int, list[int]]
"""Prefix, pending tokens, and the lengths of the branches."""


def layout_of(requests: list[Request], pool: int, seed: int = 0) -> TreeLayout:
    """Lay out requests over random slots, none of them shared."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(pool, generator=generator, dtype=torch.int64).int()
    slot_starts, row_starts, trunk, branch = [0], [0], [], []
    for prefix, chain, branches in requests:
        end = prefix + chain
        trunk += range(prefix, end)
        branch += range(prefix, end)
        for length in branches:
            start = len(trunk) - row_starts[-1] + prefix
            trunk += [end] * length
            branch += [start] * length
        row_starts.append(len(trunk))
        slot_starts.append(slot_starts[-1] + prefix + chain + sum(branches))
    slots, rows = (torch.tensor(n).diff().int() for n in (slot_starts, row_starts))
    numbers = [free[: slot_starts[-1]], torch.tensor(slot_starts[:-1]).int(), slots]
    numbers += [torch.tensor(n, dtype=torch.int32) for n in (row_starts, trunk, branch)]
    return TreeLayout(*numbers, max_slots=int(slots.max()), max_rows=int(rows.max()))


def definition(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: TreeLayout,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Row by row: gather what the row sees, attend."""
    query, keys, values = query.double(), keys.double(), values.double()
    groups = query.shape[1] // keys.shape[1]
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[2])
    for r in range(len(layout.row_starts) - 1):
        first, last = layout.row_starts[r : r + 2].tolist()
        start, count = int(layout.slot_starts[r]), int(layout.slot_counts[r])
        slots = layout.slots[start : start + count].long()
        for row in range(first, last):
            trunk, branch = int(layout.trunk[row]), int(layout.branch[row])
            own = len(slots) - (last - row)
            seen = torch.cat([slots[:trunk], slots[branch : own + 1]])
            seen = seen[-window:] if window else seen  # positions rise by one along what is seen
            k = keys[seen].repeat_interleave(groups, 1)
            v = values[seen].repeat_interleave(groups, 1)
            logits = torch.einsum("hd,shd->hs", query[row], k) * scaling
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            out[row] = torch.einsum("hs,she->he", torch.softmax(logits, -1), v)
    return out


def check(
    impl: Any,
    requests: list[Request],
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    value_width: int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """At most twice the error of a plain chain in the same precision; NaN in foreign slots."""
    needed = sum(p + c + sum(b) for p, c, b in requests)
    layout = layout_of(requests, needed + 7)
    rows = len(layout.trunk)
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(rows, heads, width, generator=generator).to(dtype)
    keys = torch.randn(needed + 7, kv_heads, width, generator=generator).to(dtype)
    values = torch.randn(needed + 7, kv_heads, value_width or width, generator=generator).to(dtype)
    foreign = torch.ones(needed + 7, dtype=torch.bool)
    foreign[layout.slots.long()] = False
    keys[foreign] = values[foreign] = float("nan")
    scaling = width**-0.5
    options = {"scaling": scaling, "window": window, "softcap": softcap}
    found = impl(tree_attention, query, keys, values, layout, **options)
    exact = definition(query, keys, values, layout, **options)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    error = (found.double() - exact).abs().max().item()
    chain = _chain(query, keys, values, layout, **options)
    chain_error = (chain.double() - exact).abs().max().item()
    # No sum is better than the rounding of its terms in fp32, and of its result in the dtype.
    terms = torch.finfo(torch.float32).eps * values[~foreign].abs().max().item()
    rounding = terms + torch.finfo(dtype).eps * exact.abs().max().item() / 2
    assert error <= 2 * max(chain_error, rounding)


def _chain(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: TreeLayout,
    scaling: float,
    window: int,
    softcap: float,
) -> Tensor:
    """What an engineer would write in the tensors' own precision."""
    dense = reference.dense_tree(layout, window)
    groups = query.shape[1] // keys.shape[1]
    q = query[dense.rows].transpose(1, 2)
    k = keys[dense.slots].transpose(1, 2).repeat_interleave(groups, dim=1)
    v = values[dense.slots].transpose(1, 2).repeat_interleave(groups, dim=1)
    logits = q @ k.transpose(-1, -2) * scaling
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    hidden = ~dense.visible[:, None]
    probs = torch.softmax(logits.float().masked_fill(hidden, float("-inf")), -1).to(q.dtype)
    out = (probs @ v).transpose(1, 2)
    result = query.new_empty(query.shape[0], query.shape[1], values.shape[2])
    result[dense.rows[dense.valid]] = out[dense.valid]
    return result


REQUESTS: dict[str, list[Request]] = {
    "one token": [(0, 1, [])],
    "decode": [(17, 1, []), (0, 1, []), (130, 1, [])],
    "prefill": [(0, 70, []), (33, 5, [])],
    "candidates": [(64, 0, [1] * 20), (5, 1, [1] * 3), (200, 0, [1])],
    "long branches": [(9, 2, [3, 1, 4, 1, 5]), (100, 0, [2, 2])],
    "mixed": [(12, 40, []), (300, 1, [1] * 20), (1, 0, [7])],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=list(REQUESTS))
def test_layouts(impl: Any, requests: list[Request], dtype: torch.dtype) -> None:
    check(impl, requests, 4, 2, 32, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width"),
    [
        (1, 1, 32, 32),
        (12, 12, 64, 64),
        (8, 1, 80, 80),
        (6, 2, 96, 96),
        (4, 4, 128, 64),
        (2, 1, 192, 128),
        (4, 2, 256, 256),
        (3, 3, 40, 33),
    ],
)
def test_heads(
    impl: Any, heads: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype
) -> None:
    check(impl, [(40, 1, [1] * 5), (3, 2, [2, 1])], heads, kv_heads, width, dtype, value_width)


@pytest.mark.parametrize("window", [1, 3, 64, 1000])
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=list(REQUESTS))
def test_sliding_windows(impl: Any, requests: list[Request], window: int) -> None:
    check(impl, requests, 4, 2, 32, torch.float32, window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcaps(impl: Any, softcap: float, dtype: torch.dtype) -> None:
    check(impl, REQUESTS["mixed"], 4, 2, 32, dtype, softcap=softcap, window=50)


@pytest.mark.parametrize("prefix", [2047, 4096, 20_001])
def test_long_prefixes(impl: Any, prefix: int) -> None:
    if impl.interpreted and prefix > 5000:
        pytest.skip("takes long in Triton's interpreter")
    check(impl, [(prefix, 0, [1] * 20), (9, 1, [])], 2, 1, 64, torch.bfloat16)


def test_a_prefix_of_131072(impl: Any) -> None:
    if impl.interpreted:
        pytest.skip("takes long in Triton's interpreter")
    check(impl, [(131_072, 0, [1, 2])], 1, 1, 32, torch.bfloat16)


def test_large_logits_do_not_overflow(impl: Any) -> None:
    layout = layout_of([(50, 1, [1, 1])], 60)
    query = torch.full((3, 1, 32), 100.0)
    keys, values = torch.randn(60, 1, 32) * 100, torch.randn(60, 1, 32)
    found = impl(tree_attention, query, keys, values, layout, scaling=1.0)
    exact = definition(query, keys, values, layout, scaling=1.0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_strided_queries_and_shared_slots(impl: Any) -> None:
    """As a model hands them over: head-major queries, two requests with one prefix."""
    layout = layout_of([(30, 0, [1] * 4), (30, 0, [1] * 2)], 80)
    layout.slots[34:64] = layout.slots[:30]
    query = torch.randn(4, 6, 32).transpose(0, 1)
    keys, values = torch.randn(2, 80, 2, 32).unbind()
    found = impl(tree_attention, query, keys, values, layout, scaling=0.2)
    exact = definition(query, keys, values, layout, scaling=0.2)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_strided_layouts_and_heads(impl: Any) -> None:
    """A layout of views: every second number, and one number for all rows."""
    layout = layout_of([(12, 0, [1] * 4)], 40)
    spread = [torch.stack([t, torch.full_like(t, -9)], 1)[:, 0] for t in layout[:6]]
    spread[4] = layout.trunk[:1].expand(4)
    query, keys, values = torch.randn(4, 2, 64), torch.randn(40, 1, 64), torch.randn(40, 1, 64)
    if impl.name != "native":  # which wants heads in one piece
        query, keys, values = query[..., ::2], keys[..., ::2], values[..., ::2]
    views = TreeLayout(*spread, *layout[6:])
    found = impl(tree_attention, query, keys, values, views, scaling=0.2)
    exact = definition(query, keys, values, layout, scaling=0.2)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_changes_no_bit(impl: Any) -> None:
    if impl.name != "native":
        pytest.skip("only the native ops share work out among threads")
    layout = layout_of(REQUESTS["mixed"], 2000)
    query = torch.randn(len(layout.trunk), 4, 32)
    keys, values = torch.randn(2, 2000, 2, 32).unbind()
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(impl(tree_attention, query, keys, values, layout, scaling=0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_neighbours_change_nothing(impl: Any) -> None:
    both = layout_of([(90, 0, [1] * 20), (300, 1, [2, 1])], 500)
    query, (keys, values) = torch.randn(24, 4, 32), torch.randn(2, 500, 2, 32).unbind()
    alone = TreeLayout(
        both.slots[:110],
        both.slot_starts[:1],
        both.slot_counts[:1],
        both.row_starts[:2],
        both.trunk[:20],
        both.branch[:20],
        110,
        20,
    )
    together = impl(tree_attention, query, keys, values, both, scaling=0.2)
    one = impl(tree_attention, query[:20], keys, values, alone, scaling=0.2)
    if impl.name == "native":
        assert torch.equal(together[:20], one)
    torch.testing.assert_close(together[:20], one, rtol=1e-5, atol=1e-6)


def test_any_input(impl: Any) -> None:
    @settings(max_examples=impl.size(40, 10), deadline=None)
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        request = st.tuples(
            st.integers(0, 150), st.integers(0, 6), st.lists(st.integers(1, 4), max_size=6)
        ).filter(lambda r: r[1] + len(r[2]) > 0)
        requests = data.draw(st.lists(request, min_size=1, max_size=4), label="requests")
        kv_heads = data.draw(st.integers(1, 3), label="kv_heads")
        groups = data.draw(st.integers(1, 4), label="groups")
        width = data.draw(st.integers(1, 130), label="width")
        value_width = data.draw(st.integers(1, 130), label="value_width")
        dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
        window = data.draw(st.sampled_from([0, 0, 1, 5, 100]), label="window")
        softcap = data.draw(st.sampled_from([0.0, 0.0, 5.0]), label="softcap")
        heads = kv_heads * groups
        check(impl, requests, heads, kv_heads, width, dtype, value_width, window, softcap)

    holds()
