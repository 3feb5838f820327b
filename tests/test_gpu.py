"""The same engine on a GPU: tokens in fp32, errors in low precision."""

from __future__ import annotations

import pytest
import torch

from fastguide import VAS, Engine, SamplingParams, ValueGuide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = ["Once upon a time, there was a little dog named Max.", "One day", "Tom ran"]


@pytest.fixture(autouse=True)
def _exact_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cuda_draws_the_same_tokens_as_the_cpu(
    stories: str, lora_guide: str, temperature: float
) -> None:
    sampling = SamplingParams(temperature=temperature, max_tokens=24, seed=1, n=2)
    found = {}
    for device in ("cpu", "cuda"):
        engine = Engine(
            stories, guides={"g": ValueGuide(lora_guide)}, dtype="float32", device=device
        )
        outputs = engine.generate(PROMPTS, VAS(3.0), {"g": 1.0}, sampling)
        found[device] = [c.token_ids for c in outputs]
    assert found["cpu"] == found["cuda"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs_on_cuda(stories: str, lora_guide: str, dtype: str) -> None:
    engine = Engine(stories, guides={"g": ValueGuide(lora_guide)}, dtype=dtype, device="cuda")
    exact = Engine(stories, guides={"g": ValueGuide(lora_guide)}, dtype="float32")
    sampling = SamplingParams(max_tokens=1, temperature=0)
    for low, high in zip(
        engine.generate(PROMPTS, VAS(0.0), sampling=sampling),
        exact.generate(PROMPTS, VAS(0.0), sampling=sampling),
        strict=True,
    ):
        assert low.base_logprobs[0] == pytest.approx(high.base_logprobs[0], abs=0.05)


def test_a_guide_on_another_device_reads_while_the_policy_does(
    stories: str, full_guide: str
) -> None:
    """The CPU stands for a second GPU."""
    sampling = SamplingParams(max_tokens=24, seed=1, n=2)
    found = []
    for device, way in ((None, "two-phase"), ("cpu", "overlap"), ("cpu", "two-phase")):
        guides = {"g": ValueGuide(full_guide, device=device)}
        engine = Engine(stories, guides, dtype="float32", device="cuda", way=way)
        outputs = engine.generate(PROMPTS, VAS(3.0), {"g": 1.0}, sampling)
        assert engine.stats.ways[way] > 0
        found.append([c.token_ids for c in outputs])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("way", ["one-pass", "two-phase"])
def test_graphs_draw_the_same_tokens(
    stories: str, lora_guide: str, full_guide: str, way: str, temperature: float
) -> None:
    """Replayed steps, rows that come and go, beside steps laid out on the host."""
    guides = {"lora": ValueGuide(lora_guide), "full": ValueGuide(full_guide)}
    rules = [VAS(4.0, 12), VAS(6.0, 20, candidate_mass=0.8), None]
    weights = [{"lora": 1.0}, {"full": 1.0, "lora": -0.5}, None]
    sampling = [SamplingParams(temperature, 10 + 9 * i, seed=i, n=1 + i) for i in range(3)]
    found = []
    for graphs in (False, True):
        engine = Engine(stories, guides, dtype="float32", device="cuda", way=way, graphs=graphs)
        for _ in range(2):
            outputs = engine.generate(PROMPTS, rules, weights, sampling)
            found.append([c.token_ids for c in outputs])
        programs = engine.runner._programs
        assert (programs is not None) == graphs
        if programs is not None:
            assert all(program.fixed.graphs for program in programs._made.values())
        assert all(cache.in_use == 0 for cache in engine.stats.caches.values())
    assert found[0] == found[1] == found[2] == found[3]
