"""The stages of ``collect`` as a Ray Data pipeline, for many GPUs or machines.

Every worker holds an engine (or a reward) of its own and takes one shard at a time; the driver
writes what comes back. So the folder, its manifest and its shards are those of ``collect``: what is
whole stays, whoever made it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastguide.engine import Engine
from fastguide.engine.text import decoder
from fastguide.ray import connected
from fastguide.rewards import load_reward
from fastguide.train.collect import (
    ROLLOUTS,
    CollectConfig,
    OnProgress,
    about_model,
    check_prompts,
    open_shards,
    responses_of,
    rollouts_of,
    sample,
    shard_prompts,
    table_of,
)
from fastguide.train.labels import REASONS, judged, keep, label_series
from fastguide.train.shards import Shards

SHARDS_AT_ONCE = 1024
"""Of responses, that the driver reads ahead of their judges: some hundred megabytes."""


def ray_data() -> Any:
    """``ray`` with ``ray.data``, on the cluster it is connected to, else on this machine."""
    connected()
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is told by the driver
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def collect_with_ray(
    model: str | Path,
    prompts: Sequence[Sequence[int]],
    folder: str | Path,
    config: CollectConfig,
    *,
    texts: Sequence[str] | None = None,
    workers: int = 1,
    gpus: float = 0,
    options: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Shards:
    """``collect`` on ``workers`` engines; shards already there stay.

    Args:
        model: path (the same on every machine), hub id or packaged name.
        prompts: token ids of each prompt.
        folder: made if needed, by the driver.
        config: sampling and shard size.
        texts: as in ``collect``.
        workers: engines at once.
        gpus: of each engine; 0 runs on the CPU.
        options: of ``Engine``, such as ``dtype`` and ``max_rows``.
        on_progress: told after each shard, those already there included.

    Raises:
        ValueError: as ``collect``.
    """
    ray = ray_data()
    given = dict(options or {}) | ({} if gpus else {"device": "cpu"})
    asked = ray.remote(num_gpus=gpus)(_policy).remote(str(model), given)
    policy, context, about = ray.get(asked)
    check_prompts(prompts, context)
    shards = open_shards(prompts, folder, config, policy, texts)
    shards.note(**about)
    of = shards.series[ROLLOUTS]["of"]
    missing = [n for n in range(of) if not shards.has(ROLLOUTS, n)]
    todo = [
        {"number": n, "prompts": json.dumps(_chunk(prompts, texts, config, n))} for n in missing
    ]
    done, every = len(prompts) * config.samples_per_prompt, config.samples_per_prompt
    left = every * sum(len(shard_prompts(prompts, config, n)) for n in missing)
    for number, table, failed, _ in _stream(
        ray, todo, _Sampler, (str(model), given, config), workers, gpus
    ):
        shards.write(ROLLOUTS, number, table, failed=failed)
        shards.draft(ROLLOUTS, number).drop()  # of a run without Ray
        left -= table.num_rows + failed
        if on_progress is not None:
            on_progress(done - left, done)
    return shards


def label_with_ray(
    folder: str | Path,
    reward: str | Sequence[str],
    model: str | Path,
    *,
    name: str = "reward",
    max_tokens: int | None = None,
    workers: int = 1,
    gpus: float = 0,
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
) -> Shards:
    """``label`` on ``workers`` copies of a reward, by its text; ``model`` has the tokenizer.

    Raises:
        ValueError: as ``label``.
    """
    ray = ray_data()
    device = None if gpus else "cpu"
    spec = reward if isinstance(reward, str) else list(reward)
    known = load_reward(spec, trust_remote_code=trust_remote_code, weights=False)
    shards = label_series(folder, known, name, max_tokens)
    of = shards.series[name]["of"]
    missing = [n for n in range(of) if not shards.has(name, n)]
    every = responses_of(shards)
    left = sum(shards.series[ROLLOUTS]["shards"][str(n)]["rows"] for n in missing)
    arguments = (spec, device, str(model), max_tokens, trust_remote_code)
    for start in range(0, len(missing), SHARDS_AT_ONCE):
        some = missing[start : start + SHARDS_AT_ONCE]
        todo = [{"number": n, "rollouts": _ipc(shards.read(ROLLOUTS, n))} for n in some]
        for number, table, failed, reasons in _stream(ray, todo, _Judge, arguments, workers, gpus):
            keep(shards, name, number, table, failed, reasons)
            left -= table.num_rows
            if on_progress is not None:
                on_progress(every - left, every)
    return shards


def _policy(model: str, options: dict[str, Any]) -> tuple[str, int | None, dict[str, str]]:
    engine = Engine(model, guides={}, **options)
    return engine.policy, engine.limits.context, about_model(engine.name_or_path, engine.tokenizer)


class _Sampler:
    """A worker of the first stage."""

    def __init__(self, model: str, options: dict[str, Any], config: CollectConfig) -> None:
        self._engine, self._config = Engine(model, guides={}, **options), config

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (number,), (packed,) = batch["number"], batch["prompts"]
        (prompts, texts), config = json.loads(str(packed)), self._config
        first = int(number) * config.shard_prompts
        limits = [config.max_tokens] * len(prompts)
        table = table_of(list(sample(self._engine, prompts, first, config, limits, texts)))
        failed = len(prompts) * config.samples_per_prompt - table.num_rows
        facts: dict[str, list[Any]] = {"failed": [failed], "reasons": [""]}
        return {"number": [int(number)], "table": [_ipc(table)], **facts}


class _Judge:
    """A worker of the second stage."""

    def __init__(
        self,
        spec: str | list[str],
        device: str | None,
        model: str,
        max_tokens: int | None,
        trust_remote_code: bool,
    ) -> None:
        from fastguide.models.loading import load_tokenizer

        self._max_tokens = max_tokens
        self._reward = load_reward(spec, device=device, trust_remote_code=trust_remote_code)
        self._decode = decoder(load_tokenizer(model, trust_remote_code=trust_remote_code))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (number,), (packed,) = batch["number"], batch["rollouts"]
        rollouts = rollouts_of(_table(packed))
        table, failed = judged(rollouts, self._reward, self._decode, self._max_tokens)
        reasons = "\n".join(" ".join(reason.split()) for reason in failed[:REASONS])
        facts: dict[str, list[Any]] = {"failed": [len(failed)], "reasons": [reasons]}
        return {"number": [int(number)], "table": [_ipc(table)], **facts}


def _stream(
    ray: Any,
    items: list[dict[str, Any]],
    worker: type,
    arguments: tuple[Any, ...],
    workers: int,
    gpus: float,
) -> Iterator[tuple[int, Any, int, list[str]]]:
    """What the workers make of the items, as it comes: number, table, failures, some reasons."""
    if not items:
        return
    data = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=1,
        concurrency=min(workers, len(items)),
        num_gpus=gpus,
    )
    for row in data.iter_rows():
        reasons = str(row["reasons"]).splitlines()
        yield int(row["number"]), _table(row["table"]), int(row["failed"]), reasons


def _chunk(
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str] | None,
    config: CollectConfig,
    number: int,
) -> tuple[list[list[int]], list[str] | None]:
    """The prompts of one shard and their texts."""
    start = number * config.shard_prompts
    ours = None if texts is None else list(texts[start : start + config.shard_prompts])
    return shard_prompts(prompts, config, number), ours


def _ipc(table: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _table(data: bytes) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(data).read_all()
