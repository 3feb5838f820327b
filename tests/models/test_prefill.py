"""Prompts packed for flash kernels: the same attention as the definition's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastguide.cache import KVPool
from fastguide.kernels import TreeLayout, reference
from fastguide.models import attention as attention_module
from fastguide.models.attention import AttentionPlan, attention
from fastguide.models.prefill import Heads, Packed, kernel_for, kernels_for, packed_attention


def layout_of(requests: list[tuple[int, int]], pool: int, device: str = "cpu") -> TreeLayout:
    """Chains of so many rows after so many cached slots each, the slots in no order."""
    slots, starts, counts, rows, trunk = [], [], [], [0], []
    every = torch.randperm(pool).tolist()
    for cached, new in requests:
        starts.append(len(slots))
        counts.append(cached + new)
        slots += [every.pop() for _ in range(cached + new)]
        rows.append(rows[-1] + new)
        trunk += list(range(cached, cached + new))
    numbers = [slots, starts, counts, rows, trunk, trunk]
    tensors = [torch.tensor(n, dtype=torch.int32, device=device) for n in numbers]
    return TreeLayout._make([*tensors, max(counts), max(new for _, new in requests)])


def definition(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float, window: int, cap: float
) -> Tensor:
    """What a flash kernel computes: the last row of a request sees all of its slots."""
    out = torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    for r in range(len(packed.rows) - 1):
        mine = slice(int(packed.rows[r]), int(packed.rows[r + 1]))
        own = slice(int(packed.slots[r]), int(packed.slots[r + 1]))
        q, k, v = query[mine], key[own].repeat_interleave(groups, 1), value[own]
        v = v.repeat_interleave(groups, 1)
        logits = torch.einsum("nhd,thd->hnt", q, k) * scale
        logits = cap * torch.tanh(logits / cap) if cap else logits
        n, t = logits.shape[1:]
        at, to = torch.arange(n)[:, None] + t - n, torch.arange(t)
        hidden = (to > at) | ((to <= at - window) if window else torch.zeros(n, t, dtype=bool))
        logits = logits.masked_fill(hidden.to(logits.device), float("-inf"))
        out[mine] = torch.einsum("hnt,thd->nhd", logits.softmax(-1), v)
    return out


REQUESTS = [
    [(0, 7)],
    [(0, 5), (12, 3), (40, 1)],
    [(3, 64), (0, 1), (130, 20), (1, 2)],
]


@pytest.mark.parametrize("requests", REQUESTS, ids=str)
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_packing_keeps_who_sees_whom(
    requests: list[tuple[int, int]], window: int, cap: float
) -> None:
    torch.manual_seed(0)
    layout = layout_of(requests, 400)
    keys, values = torch.randn(2, 400, 2, 16, dtype=torch.float64).unbind()
    query = torch.randn(len(layout.trunk), 4, 16, dtype=torch.float64)
    found = packed_attention(
        definition, query, keys, values, layout, Packed.of(layout), 0.25, window, cap
    )
    expected = reference.tree_attention(
        query, keys, values, layout, scaling=0.25, window=window, softcap=cap
    )
    torch.testing.assert_close(found, expected)


@torch.inference_mode()
def test_only_chains_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tree kernel does not run, prompts go to the flash kernel, branches never."""
    asked = []

    def kernel_for(*_: Any) -> Any:
        asked.append(True)
        return definition

    monkeypatch.setattr(attention_module, "kernel_for", kernel_for)
    monkeypatch.setattr(AttentionPlan, "streams", lambda *_: False)
    layout, pool = layout_of([(2, 3), (0, 4)], 16), KVPool(16)
    pool.write(0, torch.arange(16), *torch.randn(2, 16, 2, 8).unbind())
    targets = torch.cat([layout.slots[2:5], layout.slots[5:]]).long()
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    query, key, value = torch.randn(1, 4, 7, 8), *torch.randn(2, 1, 2, 7, 8).unbind()
    found = [
        attention(module, query, key, value, None, plan=AttentionPlan(pool, targets, layout, chain))
        for chain in (True, False)
    ]
    assert len(asked) == 1
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)


def test_what_no_kernel_can_take() -> None:
    heads = Heads(torch.device("cpu"), torch.bfloat16, 4, 4, 64, 64, capped=False)
    assert kernels_for(heads) == {}
    assert kernel_for(heads) is None


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("requests", REQUESTS, ids=str)
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_kernels_on_a_gpu(requests: list[tuple[int, int]], window: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    layout = layout_of(requests, 400, "cuda")
    keys, values = torch.randn(2, 400, kv_heads, 64, device="cuda").bfloat16().unbind()
    query = torch.randn(len(layout.trunk), 4, 64, device="cuda").bfloat16()
    heads = Heads(query.device, query.dtype, 4, kv_heads, 64, 64, capped=False)
    every = kernels_for(heads)
    assert every, "PyTorch brings one"
    expected = reference.tree_attention(
        query.double(), keys.double(), values.double(), layout, scaling=0.125, window=window
    )
    for kernel in every.values():
        found = packed_attention(
            kernel, query, keys, values, layout, Packed.of(layout), 0.125, window, 0.0
        )
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    assert kernel_for(heads) in every.values()
