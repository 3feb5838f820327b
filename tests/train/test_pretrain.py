"""A base model trained from nothing: killed and started again, it becomes the same model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = Path(__file__).parents[2] / "examples/stories/pretrain.py"
STORIES = [f"Once upon a time {name} saw {n} red birds. " * 24 for name in "ABC" for n in range(12)]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_killed_run_continues_to_the_same_weights(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "LENGTH", 64)
    whole, killed = tmp_path / "whole/base", tmp_path / "killed/base"
    example.pretrain(STORIES, STORIES[:9], whole, epochs=2)

    evaluate, calls = example._evaluate, []

    def killed_in_the_second(*args: object) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return float(evaluate(*args))

    monkeypatch.setattr(example, "_evaluate", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        example.pretrain(STORIES, STORIES[:9], killed, epochs=2)
    example.pretrain(STORIES, STORIES[:9], killed, epochs=2)

    one, other = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
    log = (killed.parent / "pretrain.jsonl").read_text(encoding="utf-8")
    assert len(log.splitlines()) == 2

    model = AutoModelForCausalLM.from_pretrained(killed)
    tokenizer = AutoTokenizer.from_pretrained(killed)
    assert model.config.vocab_size >= len(tokenizer)
