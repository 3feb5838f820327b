"""Responses sampled from the policy, kept in a folder of shards that a killed run continues.

The folder holds ``shard-00000.jsonl.gz``, … (one rollout per line) and ``manifest.json``, which
lists the finished shards. A shard counts once the manifest names it; both are written to a
temporary name and renamed. Draws depend on seed, prompt and position only, so that a shard made
again after a kill is the same shard: nothing is lost and nothing is there twice. (In bf16 and fp16
that takes the same ``max_rows``, too: other batches round otherwise.)
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastguide.engine import Engine
from fastguide.request import SamplingParams, sample_seed
from fastguide.train.episodes import Rollout

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled: ``samples_per_prompt`` each, ``shard_prompts`` prompts a shard."""

    samples_per_prompt: int = 2
    max_tokens: int = 128
    temperature: float = 0.7
    seed: int = 0
    shard_prompts: int = 256

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_tokens", "shard_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def collect(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    folder: str | Path,
    config: RolloutConfig,
    *,
    policy: str,
    on_shard: Callable[[int, int], None] | None = None,
) -> None:
    """Sample responses to all prompts, unguided, into ``folder``; shards already there stay.

    Args:
        engine: its base model is the policy.
        prompts: token ids of each prompt.
        folder: made if needed.
        config: sampling and shard size.
        policy: a name for the model, kept in the manifest: a folder is not continued with another.
        on_shard: called with (finished, all) shards after each one.

    Raises:
        ValueError: when the folder holds rollouts of other prompts, settings or policy.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    manifest = _open_manifest(target, _identity(prompts, config, policy), config, policy)
    starts = range(0, len(prompts), config.shard_prompts)
    for number, start in enumerate(starts):
        name = f"shard-{number:05d}.jsonl.gz"
        if name not in manifest["shards"]:
            chunk = prompts[start : start + config.shard_prompts]
            rollouts = _sample(engine, chunk, start, config)
            manifest["shards"][name] = _write_shard(target / name, rollouts)
            _write_atomically(target / MANIFEST_FILE, json.dumps(manifest, indent=1).encode())
        if on_shard is not None:
            on_shard(number + 1, len(starts))
    if not manifest["complete"]:
        manifest["complete"] = True
        _write_atomically(target / MANIFEST_FILE, json.dumps(manifest, indent=1).encode())


def read(folder: str | Path) -> Iterator[Rollout]:
    """All rollouts of a finished folder, in the order of the prompts.

    Raises:
        ValueError: when the folder has no manifest, is unfinished, or a shard is not what the
            manifest says.
    """
    source = Path(folder)
    manifest = _read_manifest(source)
    if manifest is None:
        raise ValueError(f"no rollouts at {source}: the file {MANIFEST_FILE} is missing")
    if not manifest["complete"]:
        raise ValueError(f"the rollouts at {source} are unfinished; run their collection again")
    for name, facts in sorted(manifest["shards"].items()):
        data = (source / name).read_bytes() if (source / name).is_file() else b""
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise ValueError(f"the shard {source / name} is missing or not what was written")
        for line in gzip.decompress(data).decode().splitlines():
            yield Rollout.from_json(line)


def _sample(
    engine: Engine, prompts: Sequence[Sequence[int]], first: int, config: RolloutConfig
) -> list[Rollout]:
    sampling = [
        SamplingParams(
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            n=config.samples_per_prompt,
            seed=sample_seed(config.seed, first + i + 1),
        )
        for i in range(len(prompts))
    ]
    outputs = engine.generate([list(p) for p in prompts], sampling=sampling, progress=False)
    return [
        Rollout(
            prompt=first + output.prompt,
            sample=output.sample,
            prompt_ids=tuple(prompts[output.prompt]),
            response_ids=tuple(output.token_ids),
            finish_reason=str(output.finish_reason),
        )
        for output in outputs
    ]


def _write_shard(file: Path, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    text = "".join(rollout.to_json() + "\n" for rollout in rollouts)
    data = gzip.compress(text.encode(), mtime=0)
    _write_atomically(file, data)
    return {"rollouts": len(rollouts), "sha256": hashlib.sha256(data).hexdigest()}


def _write_atomically(file: Path, data: bytes) -> None:
    part = file.with_name(file.name + ".part")
    with part.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)


def _open_manifest(
    folder: Path, identity: str, config: RolloutConfig, policy: str
) -> dict[str, Any]:
    manifest = _read_manifest(folder)
    if manifest is None:
        return {
            "format_version": FORMAT_VERSION,
            "identity": identity,
            "policy": policy,
            "config": asdict(config),
            "complete": False,
            "shards": {},
        }
    if manifest["identity"] != identity:
        raise ValueError(
            f"{folder} holds rollouts of other prompts, settings or policy; "
            "choose another folder or delete it"
        )
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {manifest.get('format_version')!r}; "
            f"this version reads {FORMAT_VERSION}"
        )
    return manifest


def _identity(prompts: Sequence[Sequence[int]], config: RolloutConfig, policy: str) -> str:
    facts = [policy, asdict(config), [list(prompt) for prompt in prompts]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
