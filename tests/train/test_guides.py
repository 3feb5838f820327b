"""From prompts to a guide: collections, training, sweeps and Monte-Carlo validation, end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from fastguide import FUDGE, VAS, Engine, SamplingParams, ValueGuide
from fastguide.assets import packaged
from fastguide.integrations.transformers import GuidedLogitsProcessor
from fastguide.models.guide_config import GuideConfig, RewardScale
from fastguide.models.value import ValueModel
from fastguide.rewards import load_reward
from fastguide.train.collect import CollectConfig, collect, read
from fastguide.train.episodes import Episode
from fastguide.train.fudge import FudgeConfig
from fastguide.train.guides import is_held_out, split, sweep, train_guide
from fastguide.train.labels import label, load_episodes
from fastguide.train.shards import Shards
from fastguide.train.validation import LABELS, labels, make_validation, validate
from fastguide.train.value import ValueConfig

STARTS = ["Once upon a time", "Tom had a red ball.", "Lily was sad.", "The dog ran", "One day"]
NAMES = ["Ann", "Ben", "Sue", "Max", "Mia", "Sam"]


@pytest.fixture(scope="module")
def decode(engine: Engine) -> Any:
    return lambda ids: engine.tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.fixture(scope="module")
def data(engine: Engine, decode: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{start} {name}" for start in STARTS for name in NAMES]
    config = CollectConfig(samples_per_prompt=3, max_tokens=20, shard_prompts=16, seed=1)
    ids = engine.tokenizer(texts).input_ids
    collect(engine, ids, folder, config, policy=engine.policy)
    label(folder, load_reward("cheerfulness"), decode)
    label(folder, load_reward("brevity"), decode, name="brevity", max_tokens=12)
    return folder


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
        "fastguide.train.prefix.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    said = "report_to is 'wandb', which is not installed: pip install wandb"
    with pytest.raises(ImportError, match=said):
        ValueConfig(**settings(tmp_path, report_to=["tensorboard", "wandb"]))


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


# --------------------------------------------------------------------------------- Monte Carlo


def test_halves_are_finished_and_judged(
    engine: Engine, decode: Any, data: Path, tmp_path: Path
) -> None:
    rollouts = [r for r in read(data) if r.sample == 0][:6]
    reward = load_reward("cheerfulness")
    make_validation(
        engine, rollouts, tmp_path, reward, decode, max_tokens=20, completions=3, seed=4
    )
    rows = list(Shards(tmp_path).rows(LABELS))
    assert len(rows) == 6
    for rollout, row in zip(rollouts, rows, strict=True):
        half = len(rollout.response_ids) // 2
        assert row["prefix_ids"] == [*rollout.prompt_ids, *rollout.response_ids[:half]]
        assert len(row["rewards"]) == 3
        assert all(half + tokens <= 20 for tokens in row["tokens"])
    # The rewards are those of whole responses, first halves included.
    finished = [r for r in read(tmp_path) if r.prompt == 0]
    half = rollouts[0].response_ids[: len(rollouts[0].response_ids) // 2]
    from fastguide.rewards import cheerfulness

    whole = [cheerfulness(decode(half + r.response_ids)) for r in finished]
    assert rows[0]["rewards"] == pytest.approx(whole)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    make_validation(
        engine, rollouts, tmp_path, reward, decode, max_tokens=20, completions=3, seed=4
    )
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == before


class Known(torch.nn.Module):
    """A value model that knows some prefixes' values."""

    def __init__(self, values: dict[tuple[int, ...], float], scale: RewardScale) -> None:
        super().__init__()
        self.head = torch.nn.Linear(1, 1)
        self.config = GuideConfig("x", scale)
        self.values = values

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = torch.full(ids.shape, float("nan"))
        for row, tokens in enumerate(ids.tolist()):
            for prefix, value in self.values.items():
                if tuple(tokens[: len(prefix)]) == prefix:
                    out[row, len(prefix) - 1] = value
        return out


def test_errors_are_against_the_mean_of_the_completions(
    engine: Engine, decode: Any, data: Path, tmp_path: Path
) -> None:
    rollouts = [r for r in read(data) if r.sample == 1][:12]
    reward = load_reward("cheerfulness")
    make_validation(engine, rollouts, tmp_path, reward, decode, max_tokens=20, completions=4)
    _, scale = load_episodes(data)
    config = GuideConfig("stories", scale)
    prefixes, rewards = labels(tmp_path, config)
    means = [statistics.fmean(r) for r in rewards]
    keys = [tuple(p) for p in prefixes]
    right: Any = Known(dict(zip(keys, means, strict=True)), scale)
    found = validate(right, tmp_path)
    assert found.mse.mean == pytest.approx(0.0, abs=1e-9)
    assert found.explained_variance.mean == pytest.approx(1.0)
    assert found.correlation.mean == pytest.approx(1.0)
    noise = statistics.fmean(statistics.variance(r) / 4 for r in rewards)
    assert found.noise == pytest.approx(noise)
    shifted: Any = Known({k: m + 0.5 for k, m in zip(keys, means, strict=True)}, scale)
    off = validate(shifted, tmp_path)
    assert off.mse.mean == pytest.approx(0.25)
    assert off.mse.low <= off.mse.mean <= off.mse.high
    later = dataclasses.replace(config, gamma=0.5)
    lengths = [row["tokens"] for row in Shards(tmp_path).rows(LABELS)]
    for values, discounted, tokens in zip(
        rewards, labels(tmp_path, later)[1], lengths, strict=True
    ):
        assert discounted == [0.5**n * value for n, value in zip(tokens, values, strict=True)]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reward": RewardScale("brevity")}, "has reward 'cheerfulness', the guide 'brevity'"),
        ({"kind": "classifier"}, "the guide is a classifier; allowed are value models"),
        ({"training": {"policy": "other@123"}}, "has policy 'stories@.*', the guide 'other@123'"),
        ({"training": {"max_tokens": 64}}, "has max_tokens 20, the guide 64"),
        ({"training": {"held_out": 0.01}}, "of 10% of the prompts, of which the guide held out 1%"),
    ],
)
def test_guides_that_a_set_cannot_measure_are_refused(
    engine: Engine, decode: Any, data: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    rollouts = [r for r in read(data) if r.sample == 1][:2]
    reward = load_reward("cheerfulness")
    make_validation(
        engine, rollouts, tmp_path, reward, decode, max_tokens=20, completions=1, held_out=0.1
    )
    guide = dataclasses.replace(GuideConfig("stories", RewardScale("cheerfulness")), **changed)
    with pytest.raises(ValueError, match=said):
        labels(tmp_path, guide)


def test_rewards_per_token_are_validated_by_what_is_to_come(
    engine: Engine, decode: Any, data: Path, tmp_path: Path
) -> None:
    rollouts = [r for r in read(data) if r.sample == 1][:8]
    reward = load_reward("brevity")
    make_validation(engine, rollouts, tmp_path, reward, decode, max_tokens=60, completions=2)
    scale = RewardScale("brevity", -30.0, 5.0, per_token=True)
    config = GuideConfig("stories", scale)
    prefixes, left = labels(tmp_path, config)
    rows = list(Shards(tmp_path).rows(LABELS))
    assert left == [[-tokens / 5.0 for tokens in row["tokens"]] for row in rows]
    _, less = labels(tmp_path, dataclasses.replace(config, gamma=0.5))
    assert less == [[-(1 - 0.5**n) / 5.0 for n in row["tokens"]] for row in rows]
    known = {tuple(p): statistics.fmean(r) + 7 for p, r in zip(prefixes, left, strict=True)}
    model: Any = Known(known, scale)
    assert validate(model, tmp_path).mse.mean == pytest.approx(0.0, abs=1e-9)


def test_a_real_guide_is_measured(engine: Engine, decode: Any, data: Path, tmp_path: Path) -> None:
    rollouts = [r for r in read(data) if r.sample == 2][:10]
    reward = load_reward("cheerfulness")
    make_validation(engine, rollouts, tmp_path, reward, decode, max_tokens=128, completions=4)
    found = validate(ValueModel.from_pretrained("cheerful", dtype=torch.float32), tmp_path)
    assert found.prefixes == 10
    assert found.correlation.mean > 0.2
