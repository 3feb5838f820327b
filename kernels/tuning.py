"""Launch tables of the Triton ops: block sizes, warps and splits by shape, and nothing measured.

There is no autotuning while serving: a launch is a pure function of shapes and of the device, so
that a captured graph, a test and an ahead-of-time compilation see the same kernels. What a kernel
is compiled for comes in powers of two, so that few variants serve all shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

MAX_COLUMNS = 257
"""Most columns of ``topk_logsumexp``: 256 candidates and the one below them."""

MAX_HEAD = 256
"""Largest head of ``tree_attention``: a larger one fits neither registers nor shared memory."""

PROCESSORS = 132
SHARED_MEMORY = 227 * 1024
"""What to plan for where there is no GPU to ask: multiprocessors of an H100 or H200, and the bytes
of shared memory that a program can have there."""


@lru_cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def processors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return _properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have on the device."""
    if device.type != "cuda":
        return SHARED_MEMORY
    return _properties(device).shared_memory_per_block_optin


def _roomy(device: torch.device) -> bool:
    """Whether tensor cores can take large blocks from shared memory, as from Hopper on."""
    return shared_memory(device) >= 200 * 1024


def power_of_two(least: int) -> int:
    """The smallest power of two that is not below ``least``."""
    return 1 << max(least - 1, 0).bit_length()


UNROLL = 4
"""Vectors of 16 bytes that a thread of ``topk_logsumexp`` has in flight."""


@dataclass(frozen=True)
class Scan:
    """Launch of ``topk_logsumexp``: ``splits`` programs per row, each with a part of it."""

    columns: int
    """Keys that a program keeps: ``k`` rounded up to a power of two."""
    vector: int
    """Elements in 16 bytes."""
    warps: int
    """``UNROLL * 32 * warps`` lanes, each with one vector of every tile."""
    tiles: int
    """Tiles of a part, rounded up to a power of two."""
    part: int
    """Elements of a part."""
    splits: int
    merge_warps: int


def scan(logits: torch.Tensor, k: int, shifted: bool) -> Scan:
    """How to share out logits ``[N, V]``; ``shifted`` rows do not begin at multiples of 16 bytes.

    Few rows are split until every multiprocessor has four programs, whose loads together hide the
    latency of memory; one program merges ``splits * columns`` keys, which bounds the splits. Then
    a program sorts its lanes, and ``columns`` vectors of each of its tiles: lanes and tiles balance
    near ``lanes**2 = columns * vectors``.
    """
    rows, vocab = logits.shape
    columns = power_of_two(max(k, 2))
    vector = 16 // logits.element_size()
    vectors = -(-vocab // vector)
    wanted = power_of_two(-(-4 * processors(logits.device) // rows))
    splits = min(wanted, max(1024 // columns, 8), -(-vectors // 512))
    share = -(-vectors // splits)
    lanes = 256 if share > 512 else 512
    while lanes < 2048 and (lanes < columns or 2 * lanes * lanes < columns * share):
        lanes *= 2
    # The second look holds columns * tiles vectors at once, and numbers vectors with 16 bits.
    tiles = min(-(-share // lanes), 2048 // columns, 2**16 // lanes)
    part = tiles * lanes - shifted  # a shifted part begins within the first vector
    splits = -(-vectors // part)
    return Scan(
        columns=columns,
        vector=vector,
        warps=lanes // (32 * UNROLL),
        tiles=power_of_two(tiles),
        part=part * vector,
        splits=splits,
        merge_warps=4 if splits * columns <= 1024 else 8,
    )


def tail_warps(rows: int, device: torch.device) -> int:
    """Warps of a program that may draw from the tail.

    Such a draw belongs to one program and is bound by its instructions, so a few rows get all that
    a multiprocessor can run; many rows share multiprocessors.
    """
    return 16 if rows <= processors(device) else 8


@dataclass(frozen=True)
class Attention:
    """Launch of ``tree_attention``: ``row_blocks`` times ``splits`` programs per KV head."""

    block_m: int
    """Rows of a program: query heads of a KV head, of all rows of a request."""
    block_n: int
    """Slots of one step."""
    warps: int
    stages: int
    row_blocks: int
    splits: int
    """Programs that share the slots, a power of two."""


def attention(kv_heads: int, rows: int, slots: int, head: int, query: torch.Tensor) -> Attention:
    """How to attend with ``rows`` queries of size ``head`` per KV head, of ``kv_heads`` in all.

    Decoding is bound by the bytes of the slots: as many rows as fit share one read of them, and
    the slots are split, into 128 at least, as long as all programs run at once. Of ``2 b + 1``
    stages come ``b`` steps of keys and values in flight, since their addresses are loaded too.
    """
    size = power_of_two(max(head, 32))
    most = 128 if _roomy(query.device) else 64
    block_m, block_n, warps = min(max(power_of_two(rows), 16), most), 64, 4
    if query.dtype == torch.float32:  # no tensor cores: operands lie in registers
        block_m, block_n, warps = (32, 32, 4) if size <= 64 else (32 if size <= 128 else 16, 16, 8)
    elif size > 128:
        block_m, block_n = min(block_m, 32), 32
    elif block_m == 128:
        warps = 8
    elif block_m == 64 and size == 128:
        block_n = 32
    row_blocks = -(-rows // block_m)
    resident = processors(query.device) * (2 if warps == 4 else 1)
    splits = max(1, min(resident // (kv_heads * row_blocks), -(-slots // 128)))
    return Attention(
        block_m=block_m,
        block_n=block_n,
        warps=warps,
        stages=5,
        row_blocks=row_blocks,
        splits=power_of_two(splits + 1) // 2,
    )


@dataclass(frozen=True)
class Lora:
    """Launch of ``lora_rows``: blocks of rows, of input and output columns, and of ranks."""

    block_m: int
    block_i: int
    block_o: int
    block_r: int
    warps: int
    stages: int


def lora(base: torch.Tensor, rank: int) -> Lora:
    """How to share out the rows of ``base``.

    Each block of output columns shrinks its rows anew: few rows leave most multiprocessors idle
    otherwise, many rows get wider blocks.
    """
    rows = base.shape[0]
    if base.dtype == torch.float32:  # no tensor cores: operands lie in registers
        return Lora(block_m=16, block_i=32, block_o=64, block_r=16, warps=4, stages=3)
    block_m = min(max(power_of_two(rows), 16), 64)
    block_r = min(max(power_of_two(rank), 16), 64 if _roomy(base.device) else 32)
    if rows <= 64:
        return Lora(block_m, block_i=64, block_o=64, block_r=block_r, warps=4, stages=4)
    return Lora(block_m, block_i=64, block_o=128, block_r=block_r, warps=8, stages=3)
