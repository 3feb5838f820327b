"""Real training runs on the packaged model: they learn, and they resume exactly."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from fastguide.models.value import ValueModel
from fastguide.train.episodes import Episode, Rollout, bucketed, episodes_of
from fastguide.train.fudge import FudgeConfig, FudgeTrainer, attributes
from fastguide.train.value import ValueConfig, ValueTrainer


def make_episodes(count: int, seed: int) -> list[Episode]:
    """Random tokens; the reward says whether the first response token is a small number."""
    rng = random.Random(seed)
    episodes = []
    for _ in range(count):
        prompt = (0, *(rng.randrange(1, 2048) for _ in range(rng.randrange(1, 4))))
        first = rng.choice([300, 1500])
        rest = tuple(rng.randrange(1, 2048) for _ in range(rng.randrange(2, 8)))
        episodes.append(Episode(prompt, (first, *rest), 1.0 if first == 300 else -1.0))
    return episodes


def make_model(**options: Any) -> ValueModel:
    torch.manual_seed(0)
    return ValueModel.create("stories", **({"lora_rank": 4} | options))


def settings(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "learning_rate": 3e-3,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "seed": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **others,
    }


def test_training_lowers_the_validation_error(tmp_path: Path) -> None:
    config = ValueConfig(**settings(tmp_path, ema=0.9, eval_strategy="steps", eval_steps=4))
    model = make_model()
    trainer = ValueTrainer(model, config, make_episodes(192, 0), make_episodes(48, 1))
    before = trainer.evaluate()
    assert before["eval_mse"] == pytest.approx(1.0)  # a head at zero predicts 0; rewards are +-1
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_mse"] < 0.5
    assert after["eval_explained_variance"] > 0.5
    log = [entry for entry in trainer.state.log_history if "eval_mse" in entry]
    assert [entry["step"] for entry in log[:-1]] == list(range(4, 37, 4))
    # What is saved are the averaged weights, which were validated.
    trainer.save_model(str(tmp_path / "guide"))
    saved = ValueModel.from_pretrained(tmp_path / "guide", dtype=torch.float32)
    with trainer.averaged():
        for name, weight in model.head.named_parameters():
            assert torch.equal(dict(saved.head.named_parameters())[name], weight)


@pytest.mark.parametrize("stop", [5, 11])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, stop: int) -> None:
    train = make_episodes(96, 0)
    straight = make_model()
    config = ValueConfig(**settings(tmp_path / "straight", ema=0.9))
    ValueTrainer(straight, config, train).train()

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop:
                raise KeyboardInterrupt

    config = ValueConfig(
        **settings(tmp_path / "killed", ema=0.9, save_strategy="steps", save_steps=2)
    )
    with pytest.raises(KeyboardInterrupt):
        ValueTrainer(make_model(), config, train, callbacks=[Kill()]).train()
    resumed = make_model()
    trainer = ValueTrainer(resumed, config, train)
    assert trainer.last_checkpoint() == str(tmp_path / f"killed/checkpoint-{stop - 1}")
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
    assert trainer.state.global_step == 18
    weights = dict(straight.named_parameters())
    for name, weight in resumed.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 1e-4}, "has learning_rate 0.003, this run has 0.0001"),
        ({"seed": 2}, "has seed 1, this run has 2"),
        ({"ema": 0.9}, "has ema None, this run has 0.9"),
        ({"lam": 0.5}, "has lam 0.95, this run has 0.5"),
        ({"per_device_train_batch_size": 8}, "has per_device_train_batch_size 16, this run has 8"),
        ({"lora_rank": 8}, "has trained_parameters"),
        ({"data": "others"}, "has data None, this run has 'others'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    options = settings(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    ValueTrainer(make_model(), ValueConfig(**options), make_episodes(32, 0)).train()
    other = make_model(**{k: v for k, v in changed.items() if k == "lora_rank"})
    other.config.training.update({k: v for k, v in changed.items() if k == "data"})
    fields = {k: v for k, v in changed.items() if k not in ("lora_rank", "data")}
    config = ValueConfig(**(options | fields))
    other.config = dataclasses.replace(other.config, lam=config.lam)
    trainer = ValueTrainer(other, config, make_episodes(32, 0))
    with pytest.raises(ValueError, match=said):
        trainer.train(resume_from_checkpoint=trainer.last_checkpoint())


def test_a_run_may_be_made_longer(tmp_path: Path) -> None:
    options = settings(tmp_path, num_train_epochs=1, save_strategy="epoch")
    ValueTrainer(make_model(), ValueConfig(**options), make_episodes(32, 0)).train()
    longer = ValueConfig(**(options | {"num_train_epochs": 2}))
    trainer = ValueTrainer(make_model(), longer, make_episodes(32, 0))
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    "options", [{"freeze": True}, {"freeze": True, "head": "mlp"}, {"lora_rank": None}]
)
def test_heads_and_whole_backbones_train_and_come_back(tmp_path: Path, options: dict) -> None:
    model = make_model(**options)
    config = ValueConfig(**settings(tmp_path, num_train_epochs=1, learning_rate=1e-3))
    trainer = ValueTrainer(model, config, make_episodes(64, 0), make_episodes(32, 1))
    before = trainer.evaluate()["eval_mse"]
    trainer.train()
    assert trainer.evaluate()["eval_mse"] < before
    trainer.save_model(str(tmp_path / "guide"))
    loaded = ValueModel.from_pretrained(tmp_path / "guide", dtype=torch.float32)
    ids = torch.tensor([[0, 300, 7, 9]])
    torch.testing.assert_close(loaded(ids), model.eval()(ids), rtol=1e-5, atol=1e-5)
    files = {file.name for file in (tmp_path / "guide").iterdir()}
    assert ("model.safetensors" in files) == (options.get("lora_rank", 0) is None)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_any_rewards_and_lengths_train(tmp_path: Path, bf16: bool, ema: float | None) -> None:
    """Rewards of ±1e4; responses that are empty, of one token, and as long as the context."""
    rng = random.Random(0)

    def response(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, 2048) for _ in range(length))

    lengths = [0, 1, 1023, 5, 5, 0, 1, 7]
    episodes = [
        Episode((0,), response(n), 1e4 if i % 2 else -1e4) for i, n in enumerate(lengths)
    ] * 2  # each prompt and response twice
    config = ValueConfig(
        **settings(
            tmp_path,
            bf16=bf16,
            ema=ema,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            logging_steps=1,
        )
    )
    model = make_model()
    trainer = ValueTrainer(model, config, episodes, episodes[:8])
    before = trainer.evaluate()["eval_mse"]
    assert before == pytest.approx(1e8)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(map(math.isfinite, logged))
    assert all(p.isfinite().all() for p in model.parameters())
    assert math.isfinite(trainer.evaluate()["eval_mse"])


def test_rewards_of_ten_thousand_are_learnt(tmp_path: Path) -> None:
    """In standard units, as every reward."""
    raw = make_episodes(192, 0)
    rollouts = [Rollout(i, 0, e.prompt_ids, e.response_ids, "stop") for i, e in enumerate(raw)]
    episodes, scale = episodes_of(rollouts, [1e4 * e.reward for e in raw], "huge")
    assert scale.std == pytest.approx(1e4, rel=0.05)
    trainer = ValueTrainer(make_model(), ValueConfig(**settings(tmp_path)), episodes, episodes)
    trainer.train()
    assert trainer.evaluate()["eval_explained_variance"] > 0.5


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    lengths = [2, 60, 2, 2, 60, 60, 2, 30, 2, 2, 60, 2, 2, 11, 2, 2]
    episodes = [
        Episode((0, i), tuple(300 + (7 * i + j) % 99 for j in range(n)), float(i % 3))
        for i, n in enumerate(lengths)
    ]
    weights = []
    for size, steps in ((16, 1), (4, 4)):
        model = make_model()
        with torch.no_grad():
            next(model.head.parameters()).normal_()
        config = ValueConfig(
            **settings(
                tmp_path / str(size),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                max_steps=2,
                optim="sgd",
                max_grad_norm=1e9,
            )
        )
        ValueTrainer(model, config, episodes).train()
        weights.append([p.detach() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    """The training set contradicts the validation set, so the first evaluation is the best."""
    train, valid = make_episodes(64, 0), make_episodes(32, 1)
    valid = [dataclasses.replace(e, reward=-e.reward) for e in valid]
    config = ValueConfig(
        **settings(
            tmp_path,
            ema=0.9,
            num_train_epochs=8,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="mse",
            greater_is_better=False,
        )
    )
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = ValueTrainer(make_model(), config, train, valid, callbacks=[stopping])
    trainer.train()
    errors = [e["eval_mse"] for e in trainer.state.log_history if "eval_mse" in e]
    assert trainer.state.global_step == 4 * 3 < 4 * 8
    assert errors[0] == min(errors) < errors[-1]
    assert trainer.evaluate()["eval_mse"] == pytest.approx(errors[0], rel=1e-6)


def test_metrics_go_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    config = ValueConfig(
        **settings(tmp_path, max_steps=2, logging_steps=1, report_to="tensorboard")
    )
    trainer = ValueTrainer(make_model(), config, make_episodes(32, 0), make_episodes(16, 1))
    trainer.train()
    trainer.evaluate()
    log = events.EventAccumulator(str(tmp_path / "logs"))
    log.Reload()
    assert {"train/loss", "eval/mse", "eval/explained_variance"} <= set(log.Tags()["scalars"])


def test_a_classifier_learns_the_attribute(tmp_path: Path) -> None:
    train, valid = (attributes(make_episodes(n, s), above=0.0) for n, s in ((192, 0), (48, 1)))
    trainer = FudgeTrainer(make_model(), FudgeConfig(**settings(tmp_path)), train, valid)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.45
    assert after["eval_accuracy"] > 0.8  # a prompt alone tells nothing
    assert after["eval_last_accuracy"] > 0.9


def test_most_may_have_the_highest_reward() -> None:
    episodes = [Episode((1,), (2,), reward) for reward in (1.0, 1.0, 1.0, 0.0)]
    assert [e.reward for e in attributes(episodes)] == [1.0, 1.0, 1.0, 0.0]


def test_attributes_need_both_kinds() -> None:
    episodes = [Episode((1,), (2,), reward) for reward in (0.1, 0.5, 2.0, 3.0)]
    assert [e.reward for e in attributes(episodes)] == [0.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="none of 4 responses have a reward above the border"):
        attributes(episodes, above=9)
    with pytest.raises(ValueError, match="paid per token"):
        attributes([Episode((1,), (2,), 0.0, token_reward=1.0)])


def test_batches_hold_every_episode_once_and_like_lengths() -> None:
    episodes = make_episodes(100, 2)
    batches = bucketed(episodes, 8, seed=0)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert bucketed(episodes, 8, seed=0) == batches != bucketed(episodes, 8, seed=1)
    flat = [i for batch in batches for i in batch]  # cut again by the data loader
    assert [flat[i : i + 8] for i in range(0, 100, 8)] == batches
    spread = [max(len(episodes[i]) for i in b) - min(len(episodes[i]) for i in b) for b in batches]
    assert sum(spread) / len(spread) <= 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"lam": 1.5},
        {"ema": 1.0},
        {"gamma": -0.1},
        {"length_pool": 0},
        {"learning_rate": "abc"},
        {"learning_rate": -1.0},
        {"ema": "abc"},
        {"num_train_epochs": -1},
        {"gradient_accumulation_steps": 0},
    ],
)
def test_wrong_settings_name_themselves(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ValueConfig(**settings(tmp_path, **wrong))
