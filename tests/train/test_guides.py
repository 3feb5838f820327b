"""From a collection to a guide that steers; sweeps."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastguide import FUDGE, VAS, Engine, SamplingParams, ValueGuide
from fastguide.assets import packaged
from fastguide.integrations.transformers import GuidedLogitsProcessor
from fastguide.models.guide_config import GuideConfig
from fastguide.models.value import ValueModel
from fastguide.rewards import Sample
from fastguide.train.episodes import Episode, mean_return
from fastguide.train.fudge import FudgeConfig
from fastguide.train.guides import (
    _against,
    early_stopping,
    is_held_out,
    split,
    sweep,
    train_guide,
)
from fastguide.train.labels import label, load_episodes
from fastguide.train.shards import Shards
from fastguide.train.value import ValueConfig


class FewWords:
    """Paid per token, of responses that differ though all have as many tokens."""

    name, per_token = "few-words", -1.0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [-float(len(sample.response.split())) for sample in samples]


def settings(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "use_cpu": True,
        "disable_tqdm": True,
        **others,
    }


def test_all_responses_to_a_prompt_lie_on_one_side() -> None:
    episodes = [Episode((i // 3,), (i,), 0.0) for i in range(900)]
    train, valid = split(episodes, 0.2)
    assert len(train) + len(valid) == 900
    assert 0.1 < len(valid) / 900 < 0.3
    assert not {e.prompt_ids for e in train} & {e.prompt_ids for e in valid}
    assert all(is_held_out(e.prompt_ids, 0.2) for e in valid)


def test_a_value_guide_from_a_collection_steers(engine: Engine, data: Path, tmp_path: Path) -> None:
    config = ValueConfig(**settings(tmp_path / "guide", save_strategy="no"))
    metrics = train_guide("value", data, "stories", config, held_out=0.2, lora_rank=4)
    assert 0 < metrics["eval_mse"] < 3
    saved = GuideConfig.load(tmp_path / "guide")
    assert (saved.kind, saved.lam, saved.reward.name) == ("value", 0.95, "cheerfulness")
    facts = saved.training
    assert facts["policy"] == engine.policy
    assert facts["data"] == Shards(data).digest("rollouts", "reward")
    assert facts["rollouts"] == 90
    assert facts["validation"]["mse"] == pytest.approx(metrics["eval_mse"], abs=1e-5)
    assert facts["hyperparameters"]["learning_rate"] == 1e-3
    steered = Engine("stories", {"g": ValueGuide(tmp_path / "guide")}, dtype="float32")
    sampling = SamplingParams(temperature=0.7, max_tokens=8, seed=0)
    (output,) = steered.generate(["Once"], VAS(beta=4.0), {"g": 1.0}, sampling)
    assert sum(output.kl) > 0


def test_fixed_seeds_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        config = ValueConfig(**settings(tmp_path / name, save_strategy="no", ema=0.9))
        train_guide("value", data, "stories", config, lora_rank=2)
    files = sorted(f.name for f in (tmp_path / "one").iterdir() if f.is_file())
    assert "value_head.safetensors" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_classifier_guides_under_the_fudge_rule(data: Path, tmp_path: Path) -> None:
    config = FudgeConfig(**settings(tmp_path / "guide", save_strategy="no"))
    metrics = train_guide("fudge", data, "stories", config, held_out=0.2, lora_rank=4, above=0.3)
    assert 0 < metrics["eval_loss"] < 1
    assert 0.5 <= metrics["eval_majority"] < 1
    saved = GuideConfig.load(tmp_path / "guide")
    assert saved.kind == "classifier"
    assert saved.training["above"] == 0.3
    engine = Engine("stories", {"g": ValueGuide(tmp_path / "guide")}, dtype="float32")
    (output,) = engine.generate(["Once"], FUDGE(), {"g": 1.0}, SamplingParams(max_tokens=4, seed=0))
    assert len(output.token_ids) == 4
    with pytest.raises(ValueError, match=r"'g' is a prefix classifier, the rule is VAS; allowed"):
        engine.generate(["Once"], VAS(), {"g": 1.0})
    with pytest.raises(ValueError, match=r"rewards lie from .* to"):
        train_guide("fudge", data, "stories", config, above=100.0)


def test_a_value_model_does_not_guide_under_the_fudge_rule() -> None:
    engine = Engine("stories", {"cheerful": ValueGuide("cheerful")}, dtype="float32")
    said = "'cheerful' is a value model, the rule is FUDGE; allowed are VAS and ARGS"
    with pytest.raises(ValueError, match=said):
        engine.generate(["Once"], FUDGE())
    with pytest.raises(ValueError, match=said):
        GuidedLogitsProcessor(
            {"cheerful": ValueGuide("cheerful")}, FUDGE(), tokenizer=engine.tokenizer
        )


def test_a_logger_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastguide.train.settings.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    said = "report_to is 'wandb', which is not installed: pip install wandb"
    with pytest.raises(ImportError, match=said):
        ValueConfig(**settings(tmp_path, report_to=["tensorboard", "wandb"]))
    with pytest.raises(ValueError, match=r"report_to is 'tensorbord'; allowed are .*tensorboard"):
        ValueConfig(**settings(tmp_path, report_to="tensorbord"))


def test_weights_are_saved_in_another_dtype(data: Path, tmp_path: Path) -> None:
    config = ValueConfig(**settings(tmp_path, save_strategy="no"))
    train_guide(
        "value",
        data,
        "stories",
        config,
        lora_rank=2,
        dtype=torch.bfloat16,
        save_dtype=torch.float16,
    )
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert GuideConfig.load(tmp_path).training["dtype"] == "bfloat16"


def test_prompts_have_to_be_left_to_train_on(data: Path, tmp_path: Path) -> None:
    config = ValueConfig(**settings(tmp_path))
    with pytest.raises(ValueError, match=r"held_out is 0\.9999, which leaves none .* to train on"):
        train_guide("value", data, "stories", config, held_out=0.9999)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_heads_of_rewards_per_token_begin_at_the_mean_return(
    data: Path, decode: Callable, tmp_path: Path, head: str
) -> None:
    """Standardised rewards begin at 0, which is their mean."""
    data, begun = Path(shutil.copytree(data, tmp_path / "data")), {}
    label(data, FewWords(), decode, name="words")
    for labels in ("words", "reward"):
        config = ValueConfig(**settings(tmp_path / labels, gamma=0.9, learning_rate=0.0))
        how = {"labels": labels, "freeze": True, "head": head, "held_out": 0.3}
        train_guide("value", data, "stories", config, **how)
        model = ValueModel.from_pretrained(tmp_path / labels)
        with torch.no_grad():
            begun[labels] = model(torch.tensor([[0, 5, 9]])).unique().tolist()
    train, _ = split(load_episodes(data, "words")[0], 0.3)
    assert begun["words"] == [pytest.approx(mean_return(train, 0.9))]
    assert begun["words"][0] < -1.0
    assert begun["reward"] == [0.0]


def test_early_stopping_needs_prompts_that_are_held_out(data: Path, tmp_path: Path) -> None:
    more, callbacks = early_stopping("value", 1)
    config = ValueConfig(**settings(tmp_path, **more))
    with pytest.raises(ValueError, match=r"held_out is 0\.0, which leaves none .* \(--patience\)"):
        train_guide("value", data, "stories", config, held_out=0.0, callbacks=callbacks)


def test_a_sweep_keeps_the_best_and_goes_on(data: Path, tmp_path: Path) -> None:
    trained: list[Any] = []

    def train(folder: Path, options: dict[str, Any]) -> dict[str, float]:
        if len(trained) == 1:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(options)
        config = ValueConfig(**settings(folder, save_strategy="no"), **options)
        return train_guide("value", data, "stories", config, held_out=0.3, lora_rank=2)

    grid = {"learning_rate": [1e-6, 1e-3]}
    with pytest.raises(KeyboardInterrupt):
        sweep("value", tmp_path, grid, train)
    best, metrics = sweep("value", tmp_path, grid, train)
    assert trained == [{"learning_rate": 1e-6}, "killed", {"learning_rate": 1e-3}]
    results = json.loads((tmp_path / "sweep.json").read_text())
    assert metrics["eval_mse"] == min(r["metrics"]["eval_mse"] for r in results)
    chosen = GuideConfig.load(tmp_path).training["hyperparameters"]["learning_rate"]
    assert chosen == best["learning_rate"]
    sweep("value", tmp_path, grid, train, about="other data")
    assert trained[3:] == [{"learning_rate": 1e-6}, {"learning_rate": 1e-3}]
    assert len([f for f in tmp_path.iterdir() if f.is_dir()]) == 4
    with pytest.raises(ValueError, match="hold some prompts out"):
        sweep("value", tmp_path / "other", {"seed": [0]}, lambda folder, options: {})


@pytest.mark.parametrize("order", [[10.0, 1e-3], [1e-3, 10.0]])
def test_a_run_that_diverged_wins_no_sweep(tmp_path: Path, order: list[float]) -> None:
    def train(folder: Path, options: dict[str, Any]) -> dict[str, float]:
        folder.mkdir()
        (folder / "guide_config.json").write_text("{}")
        return {"eval_mse": math.nan if options["learning_rate"] == 10 else 1.0}

    best, _ = sweep("value", tmp_path, {"learning_rate": order}, train)
    assert best == {"learning_rate": 1e-3}
    with pytest.raises(ValueError, match="none of 1 runs ended with a number as eval_mse"):
        sweep("value", tmp_path / "other", {"learning_rate": [10]}, train)


def test_one_process_measures_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> None:
        raise AssertionError("another process measures")

    told = {"eval_mc_mse": 0.5}
    monkeypatch.setattr("fastguide.train.guides.validate", measure)
    monkeypatch.setattr("fastguide.train.guides.broadcast_object_list", lambda nothing: [told])
    other: Any = SimpleNamespace(is_world_process_zero=lambda: False)
    model: Any = None
    assert _against("set", model, other) == told


def test_a_guide_on_a_local_backbone_loads_from_anywhere(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packaged("stories"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    config = ValueConfig(**settings(Path("guide"), save_strategy="no"))
    train_guide("value", data, "base", config, lora_rank=2)
    monkeypatch.chdir("/")
    assert ValueModel.from_pretrained(tmp_path / "guide").config.kind == "value"


def test_a_guide_over_another_leaves_nothing_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "guide"
    ValueModel.create("stories", lora_rank=2).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    torch.manual_seed(0)
    whole = ValueModel.create("stories", lora_rank=None)
    torch.nn.init.normal_(next(whole.head.parameters()))
    with torch.no_grad():
        next(whole.backbone.parameters()).mul_(1.5)
    whole.save_pretrained(folder)
    assert not (folder / "adapter_config.json").exists()
    assert (folder / "notes.txt").is_file()
    ids = torch.tensor([[0, 300, 5]])
    loaded = ValueModel.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(loaded(ids), whole.eval()(ids))
