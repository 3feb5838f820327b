"""What ``bench_ops.py`` times: shapes, what we run on them, and what anyone would write instead.

A case holds several copies of its inputs, together larger than the caches, and every runner takes
the number of the copy to work on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastguide import kernels
from fastguide.kernels import TreeLayout, reference

CACHE = 96 * 2**20
"""Bytes that all copies of a case's inputs fill at least, as far as 64 copies can."""

Run = Callable[[int], Any]


@dataclass
class Case:
    """One op at one shape."""

    op: str
    shape: str
    bytes: int
    """Read and written at least, by any implementation."""
    ours: Callable[..., Any]
    """Takes ``impl`` as well."""
    others: dict[str, Run]
    """What the op competes with, the usual way first; the fastest of them counts."""
    floors: dict[str, Run] = field(default_factory=dict)
    """Lower bounds: less work than the op does."""
    copies: int = 1

    @property
    def runs(self) -> dict[str, Run]:
        """Every runner by name; ours is ``fastguide``."""
        return {"fastguide": self.ours, **self.others, **self.floors}

    def __str__(self) -> str:
        return f"{self.op} {self.shape}"


def cases(device: str, dtype: torch.dtype = torch.bfloat16) -> list[Callable[[], Case]]:
    """All cases, each to be built when its turn comes: together they would fill the memory."""
    large = device != "cpu"
    where = (device, dtype)
    heads = (32, 32, 128) if large else (12, 12, 64)
    grouped = (heads[0], heads[0] // 4, heads[2])
    width = 4096 if large else 768
    found = [partial(topk_logsumexp_case, n, 128_256, 20, *where) for n in (1, 8, 64)]
    if large:
        found += [partial(topk_logsumexp_case, n, 128_256, 20, *where) for n in (256, 1024)]
        found += [partial(topk_logsumexp_case, 1, 131_072, 20, *where)]
        found += [
            partial(topk_logsumexp_case, n, 131_072, 256, device, torch.float32) for n in (1, 64)
        ]
    found += [partial(sampling_step_case, n, 128_256, 20, *where) for n in (1, 8, 64)]
    found += [partial(sample_tail_case, n, 128_256, 64, *where) for n in (1, 8)]
    found += [
        partial(tree_attention_case, n, prefix, 20, *heads, *where)
        for n in (1, 8)
        for prefix in (128, 512, 2048, 8192)
    ]
    found += [partial(tree_attention_case, 8, 512, 20, *grouped, *where)]
    found += [partial(tree_attention_case, n, 512, 1, *heads, *where) for n in (1, 8)]
    found += [partial(lora_rows_case, n, width, width, 16, *where) for n in (21, 40, 168)]
    found += [partial(td_lambda_case, *size, device) for size in ((32, 320), (256, 1024))]
    return found


def _copies(size: int) -> int:
    return max(1, min(64, math.ceil(CACHE / max(size, 1))))


# ------------------------------------------------------------------------------- vocabulary


def _logits(rows: int, vocab: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Logits with the spread of a language model's: a few likely tokens, a long tail."""
    torch.manual_seed(0)
    size = rows * vocab * torch.finfo(dtype).bits // 8
    return [(torch.randn(rows, vocab, device=device) * 3).to(dtype) for _ in range(_copies(size))]


def topk_logsumexp_case(rows: int, vocab: int, k: int, device: str, dtype: torch.dtype) -> Case:
    """Top-k and log-sum-exp of whole rows."""
    logits = _logits(rows, vocab, device, dtype)
    ones = torch.ones(rows, device=device)
    case = Case(
        "topk_logsumexp",
        f"N={rows} V={vocab} k={k} {_short(dtype)}",
        logits[0].nbytes,
        lambda i, impl="auto": kernels.topk_logsumexp(logits[i], k, ones, impl),
        {
            "torch.topk + logsumexp": lambda i: (
                torch.topk(logits[i], k),
                torch.logsumexp(logits[i], -1),
            ),
            "the same in fp32": lambda i: _topk_fp32(logits[i], k),
        },
        {"torch.sum": lambda i: logits[i].sum(-1)},
        len(logits),
    )
    if device != "cpu" and (top := _flashinfer("top_k")):
        case.others["flashinfer.top_k + logsumexp"] = lambda i: (
            top(logits[i], k),
            torch.logsumexp(logits[i], -1),
        )
    return case


def _topk_fp32(logits: Tensor, k: int) -> tuple[Any, Tensor]:
    wide = logits.float()
    return torch.topk(wide, k), torch.logsumexp(wide, -1)


def sampling_step_case(rows: int, vocab: int, k: int, device: str, dtype: torch.dtype) -> Case:
    """From logits and scores to a token from the guided distribution of VAS, and its KL."""
    logits = _logits(rows, vocab, device, dtype)
    inverse = torch.full((rows,), 1 / 0.7, device=device)
    scores = torch.randn(1, rows, k + 1, device=device)
    row = {
        "count": torch.full((rows,), k, dtype=torch.int32, device=device),
        "mode": torch.full((rows,), reference.FILL_MEAN, dtype=torch.int32, device=device),
        "scale": torch.ones(rows, dtype=torch.float64, device=device),
        "weight": torch.full((rows,), 4.0, dtype=torch.float64, device=device),
        "seed": torch.arange(rows, device=device),
        "position": torch.full((rows,), 7, device=device),
    }
    guide_weights = torch.ones(1, rows, dtype=torch.float64, device=device)
    beta = 4.0

    def ours(i: int, impl: str = "auto") -> Any:
        top = kernels.topk_logsumexp(logits[i], k + 1, inverse, impl)
        step = (logits[i], inverse, *top, scores, guide_weights)
        return kernels.guide_sample(*step, **row, impl=impl)

    def guided(i: int) -> tuple[Tensor, Tensor]:
        z = logits[i].float() * inverse[:, None]
        ids = torch.topk(logits[i], k).indices
        s = scores[0, :, :k]
        bonus = beta * (s - s.mean(-1, keepdim=True))
        return z, z.scatter_add(1, ids, bonus)

    def multinomial(i: int) -> Tensor:
        return torch.multinomial(torch.softmax(guided(i)[1], -1), 1)

    def exponential(i: int) -> Tensor:  # as vLLM draws: no host synchronisation, no sort
        p = torch.softmax(guided(i)[1], -1)
        return p.div_(torch.empty_like(p).exponential_()).argmax(-1)

    def with_kl(i: int) -> tuple[Tensor, Tensor]:
        z, u = guided(i)
        log_p = torch.log_softmax(u, -1)
        p = log_p.exp()
        kl = (p * (log_p - torch.log_softmax(z, -1))).sum(-1)
        return p.div(torch.empty_like(p).exponential_()).argmax(-1), kl

    case = Case(
        "sampling step",
        f"N={rows} V={vocab} k={k} {_short(dtype)}",
        logits[0].nbytes,
        ours,
        {
            "torch, multinomial": multinomial,
            "torch, exponential race": exponential,
            "torch, exponential race, KL": with_kl,
        },
        {"torch.sum": lambda i: logits[i].sum(-1)},
        len(logits),
    )
    if device != "cpu" and (fused := _flashinfer("sampling.top_k_top_p_sampling_from_logits")):
        case.floors["flashinfer top-k sampling, unguided"] = lambda i: fused(
            logits[i].float(), k, 1.0
        )
    return case


def sample_tail_case(rows: int, vocab: int, k: int, device: str, dtype: torch.dtype) -> Case:
    """A draw from outside the candidates in every row; half of that tail lies before the token."""
    logits = _logits(rows, vocab, device, dtype)
    ones = torch.ones(rows, device=device)
    count = torch.full((rows,), k, device=device)
    fraction = torch.full((rows,), 0.5, dtype=torch.float64, device=device)

    def sorting(i: int) -> Tensor:
        z, order = torch.sort(logits[i], dim=-1, descending=True)
        p = torch.softmax(z[:, k:].float(), -1).cumsum(-1)
        return order.gather(1, k + torch.searchsorted(p, fraction.float()[:, None]))

    return Case(
        "sample_tail",
        f"N={rows} V={vocab} {_short(dtype)}",
        logits[0].nbytes,
        lambda i, impl="auto": kernels.sample_tail(logits[i], ones, count, fraction, impl),
        {"torch.sort + cumsum": sorting},
        {"torch.sum": lambda i: logits[i].sum(-1)},
        len(logits),
    )


# -------------------------------------------------------------------------------- attention


def tree_attention_case(
    requests: int,
    prefix: int,
    k: int,
    heads: int,
    kv_heads: int,
    width: int,
    device: str,
    dtype: torch.dtype,
) -> Case:
    """k candidates of each request over its prefix (k = 1: a plain decode step)."""
    torch.manual_seed(0)
    total = requests * (prefix + k)
    size = 2 * total * kv_heads * width * torch.finfo(dtype).bits // 8
    copies = _copies(size)
    pools = [torch.randn(2, total, kv_heads, width, device=device).to(dtype) for _ in range(copies)]
    query = torch.randn(requests * k, heads, width, device=device).to(dtype)
    slots = torch.randperm(total, dtype=torch.int32)
    own = torch.arange(prefix, prefix + k, dtype=torch.int32).repeat(requests)
    steps = torch.arange(requests + 1, dtype=torch.int32)
    starts, counts = steps[:-1] * (prefix + k), torch.full_like(steps[1:], prefix + k)
    parts = (slots, starts, counts, steps * k, torch.full_like(own, prefix), own)
    layout = TreeLayout(*(p.to(device) for p in parts), max_slots=prefix + k, max_rows=k)
    scaling = width**-0.5

    def expand(pool: Tensor) -> Tensor:
        """``[R * k, H_kv, P + 1, D]``: the cache that the published code keeps."""
        rows = pool[slots.long().to(device)].view(requests, prefix + k, kv_heads, width)
        shared = rows[:, None, :prefix].expand(-1, k, -1, -1, -1)
        whole = torch.cat([shared, rows[:, prefix:, None]], 2)
        return whole.flatten(0, 1).transpose(1, 2).contiguous()

    room = 24 * 2**30 if device != "cpu" else 2 * 2**30
    held = max(1, min(copies, room // (size * k)))
    expanded = [(expand(pool[0]), expand(pool[1])) for pool in pools[:held]]
    q = query.view(requests * k, heads, 1, width)

    def sdpa(i: int) -> Tensor:
        keys, values = expanded[i % held]
        return F.scaled_dot_product_attention(
            q, keys, values, scale=scaling, enable_gqa=heads != kv_heads
        )

    dense = reference.dense_tree(layout)
    groups = heads // kv_heads
    mask = torch.zeros(dense.visible.shape, dtype=dtype, device=device)
    mask = mask.masked_fill_(~dense.visible, -math.inf)[:, None].repeat(1, 1, groups, 1)

    def gathered(i: int) -> Tensor:
        keys, values = (
            part.index_select(0, dense.slots.flatten())
            .view(requests, prefix + k, kv_heads, width)
            .transpose(1, 2)
            for part in pools[i]
        )
        rows = query.view(requests, k, kv_heads, groups, width).permute(0, 2, 3, 1, 4)
        rows = rows.reshape(requests, kv_heads, groups * k, width)
        return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)

    return Case(
        "tree_attention",
        f"R={requests} k={k} prefix={prefix} heads={heads}/{kv_heads} D={width} {_short(dtype)}",
        size + 2 * query.nbytes,
        lambda i, impl="auto": kernels.tree_attention(
            query, pools[i][0], pools[i][1], layout, scaling=scaling, impl=impl
        ),
        {"SDPA, expanded cache": sdpa, "gather + SDPA": gathered},
        copies=copies,
    )


# ------------------------------------------------------------------------------------- LoRA


def lora_rows_case(
    rows: int, width: int, out: int, rank: int, device: str, dtype: torch.dtype
) -> Case:
    """A linear layer whose second half of the rows carries an adapter: layer and LoRA together."""
    torch.manual_seed(0)
    size = out * width * torch.finfo(dtype).bits // 8
    copies = _copies(size)
    weights = [
        (torch.randn(out + rank, width, device=device) / width**0.5).to(dtype)
        for _ in range(copies)
    ]
    x = torch.randn(rows, width, device=device).to(dtype)
    a, b = weights[0][out:].clone(), torch.randn(out, rank, device=device).to(dtype)
    first = rows // 2
    segments = torch.tensor([first, rows], dtype=torch.int32, device=device)

    def chain(i: int) -> Tensor:
        y = F.linear(x, weights[i][:out])
        y[first:].addmm_(F.linear(x[first:], a), b.T)
        return y

    def folded(i: int) -> Tensor:
        """A lies below the layer's weight: one product gives the output and the shrunk rows."""
        y = F.linear(x, weights[i])
        return y[first:, :out].addmm_(y[first:, out:], b.T)

    return Case(
        "linear + lora_rows",
        f"N={rows} {width}x{out} r={rank} {_short(dtype)}",
        size,
        lambda i, impl="auto": kernels.lora_rows(
            F.linear(x, weights[i][:out]), x, a[None], b[None], segments, impl
        ),
        {"linear + torch LoRA": chain, "A folded into the weight": folded},
        {"linear alone": lambda i: F.linear(x, weights[i][:out])},
        copies,
    )


# --------------------------------------------------------------------------------- training


def td_lambda_case(rows: int, length: int, device: str) -> Case:
    """TD(lambda) targets of a batch of responses."""
    values, rewards = torch.randn(2, rows, length, device=device).unbind()
    mask = torch.ones(rows, length, dtype=torch.bool, device=device)
    return Case(
        "td_lambda",
        f"B={rows} T={length} fp32",
        3 * values.nbytes + mask.nbytes,
        lambda i, impl="auto": kernels.td_lambda(values, rewards, mask, 1.0, 0.95, impl),
        {"torch, a loop over T": lambda i: reference.td_lambda(values, rewards, mask, 1.0, 0.95)},
    )


# ------------------------------------------------------------------------------------ names


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _flashinfer(name: str) -> Callable[..., Any] | None:
    """A function of FlashInfer, where it is installed."""
    try:
        import flashinfer
    except ImportError:
        return None
    found: Any = flashinfer
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
