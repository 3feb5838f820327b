"""One engine in several processes, each with a part of the policy, gives the tokens of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastguide import Engine

SCRIPT = """
import asyncio, json, sys

from fastguide import ARGS, VAS, AsyncEngine, Engine, SamplingParams, ValueGuide

out, lora, full, way = sys.argv[1:]
guides = {name: ValueGuide(name) for name in (lora, full, "cheerful")}
print("before", flush=True)
engine = Engine(
    "stories", guides, dtype="float32", tensor_parallel=True, way=way, kv_memory=40_000_000
)
prompts = ["Once upon a time", "The dog", "A girl named Lily went to the", "Once upon", "It was"]
rules = [VAS(beta=4.0), ARGS(weight=2.0), VAS(beta=2.0, candidate_mass=0.9), None, VAS(beta=8.0)]
weights = [{lora: 1.0}, {full: 1.0, lora: 0.5}, {"cheerful": 1.0}, None, {lora: 1.0, full: -1.0}]
sampling = SamplingParams(max_tokens=24, seed=1, n=2)
done = engine.generate(prompts, rules, weights, sampling)
again = engine.generate(prompts[:1], rules[:1], weights[:1], sampling)  # from the prefix cache

async def serve(engine):
    async with AsyncEngine(engine) as served:
        left = served.submit(prompts[0], rules[0], weights[0], SamplingParams(max_tokens=200))
        async for _ in left:
            break
        left.cancel()
        return await served.generate(prompts[1], rules[1], weights[1], sampling)

def another():
    try:
        Engine("stories", tensor_parallel=True)
    except ValueError as error:
        return str(error)
    return "made"

served = asyncio.run(serve(engine))
stats = engine.stats
with open(out, "w") as file:
    json.dump({
        "policy": engine.policy,
        "another": another(),
        "tokens": [c.token_ids for c in [*done, *again, *served]],
        "ways": stats.ways,
        "in_use": [cache.in_use for cache in stats.caches.values()],
        "reused": [cache.reused for cache in stats.caches.values()],
    }, file)
print("after", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "one-pass", "two-phase"])
def test_two_processes_give_the_tokens_of_one(
    tmp_path: Path, lora_guide: str, full_guide: str, way: str
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "alone.py").write_text(SCRIPT.replace("tensor_parallel=True", "device='cpu'"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = []
    for name, words in (("script", launch), ("alone", [])):
        out = tmp_path / f"{name}.json"
        words = [sys.executable, *words, tmp_path / f"{name}.py", out, lora_guide, full_guide, way]
        done = subprocess.run(
            list(map(str, words)), env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        ranks = 2 if name == "script" else 1
        assert done.stdout.split() == ["before"] * ranks + ["after"]  # only rank 0 comes back
        found.append(json.loads(out.read_text()))
    both, alone = found
    assert both["policy"] == alone["policy"]
    assert both["tokens"] == alone["tokens"]
    assert "this is another" in both["another"]  # a second engine would wait for ranks that follow
    assert not any(both["in_use"])
    assert any(both["reused"])
    if way != "auto":
        assert set(both["ways"]) == {way}


def test_without_a_launch() -> None:
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2 program\.py"):
        Engine(tensor_parallel=True)


def test_a_device_is_each_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device is 'cpu' and tensor_parallel is True; allowed is"):
        Engine(tensor_parallel=True, device="cpu")


def test_heads_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="has 4 heads of keys and values; 3 ranks cannot share"):
        Engine(tensor_parallel=True)
