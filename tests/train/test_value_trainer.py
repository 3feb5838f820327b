"""Real training runs on the packaged model: they learn, and they resume exactly."""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import make_episodes, make_model, settings
from transformers import EarlyStoppingCallback, TrainerCallback

from fastguide.models.value import ValueModel
from fastguide.train.episodes import Episode, Rollout, bucketed, episodes_of
from fastguide.train.fudge import FudgeConfig, FudgeTrainer, attributes
from fastguide.train.value import ValueConfig, ValueTrainer


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


MODEL = ("lora_rank", "lora_alpha", "head", "dtype")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 1e-4}, "has learning_rate 0.003, this run has 0.0001"),
        ({"seed": 2}, "has seed 1, this run has 2"),
        ({"ema": 0.9}, "has ema None, this run has 0.9"),
        ({"lam": 0.5}, "has lam 0.95, this run has 0.5"),
        ({"per_device_train_batch_size": 8}, "has per_device_train_batch_size 16, this run has 8"),
        ({"lora_rank": 8}, "has lora .*'rank': 4.* this run has .*'rank': 8"),
        ({"lora_alpha": 8}, "has lora .*'alpha': 4.* this run has .*'alpha': 8"),
        ({"head": "mlp"}, "has head 'linear', this run has 'mlp'"),
        ({"dtype": torch.bfloat16}, "has dtype 'float32', this run has 'bfloat16'"),
        ({"data": "others"}, "has data None, this run has 'others'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    options = settings(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    ValueTrainer(make_model(), ValueConfig(**options), make_episodes(32, 0)).train()
    of_model = {k: v for k, v in changed.items() if k in MODEL}
    other = make_model(**of_model)
    other.config.training.update({k: v for k, v in changed.items() if k == "data"})
    fields = {k: v for k, v in changed.items() if k != "data" and k not in MODEL}
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
        {"lam": "abc"},
        {"save_steps": "abc"},
        {"dataloader_num_workers": "abc"},
        {"bf16": "abc"},
        {"report_to": "tensorbord"},
        {"fsdp": "full_shard"},
        {"deepspeed": "zero.json"},
    ],
)
def test_wrong_settings_name_themselves(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ValueConfig(**settings(tmp_path, **wrong))


def test_launchers_that_cut_weights_in_parts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp is asked for, which cuts weights in parts"):
        ValueConfig(**settings(tmp_path))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_loss_of_validation_is_over_all_prefixes(tmp_path: Path, batch_size: int) -> None:
    """However they are batched: a mean of the batches' means would be another number for each."""
    valid = attributes(make_episodes(23, 1), above=0.0)
    model = make_model()
    with torch.no_grad():
        next(model.head.parameters()).normal_(generator=torch.Generator().manual_seed(0))
    config = FudgeConfig(**settings(tmp_path, per_device_eval_batch_size=batch_size))
    found = FudgeTrainer(model, config, valid, valid).evaluate()["eval_loss"]
    losses = []
    for episode in valid:
        ids = torch.tensor([[*episode.prompt_ids, *episode.response_ids]])
        with torch.no_grad():
            logits = model.eval()(ids)[0, len(episode.prompt_ids) - 1 :]
        label = torch.full_like(logits, episode.reward)
        losses += F.binary_cross_entropy_with_logits(logits, label, reduction="none").tolist()
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_states_may_be_computed_again_to_save_memory(tmp_path: Path) -> None:
    """The same weights, from more passes of the layers, without a word of transformers."""
    weights, passes = [], []
    for name, again in (("kept", False), ("again", True)):
        model = make_model()
        layer = model.backbone.get_submodule("base_model.model.layers.0.mlp")
        layer.register_forward_pre_hook(lambda *_: passes.append(name))  # noqa: B023
        options = settings(tmp_path / name, max_steps=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the setting's own name
            config = ValueConfig(**options, gradient_checkpointing=again)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            ValueTrainer(model, config, make_episodes(32, 0)).train()
        weights.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert (passes.count("kept"), passes.count("again")) == (2, 4)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


def test_a_trunk_in_bfloat16_trains_under_a_lora_in_float32(tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    trunk = {p.dtype for p in model.backbone.parameters() if not p.requires_grad}
    assert trunk == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train, valid = make_episodes(96, 0), make_episodes(32, 1)
    trainer = ValueTrainer(model, ValueConfig(**settings(tmp_path, ema=0.5)), train, valid)
    trainer.train()
    assert trainer.evaluate()["eval_mse"] < 0.9


def test_averages_are_in_float32_whatever_the_weights_are_in(tmp_path: Path) -> None:
    """A thousandth of a step is nothing in bfloat16."""
    model = make_model(lora_rank=None, dtype=torch.bfloat16)
    before = {n: p.detach().float() for n, p in model.named_parameters()}
    config = ValueConfig(**settings(tmp_path, max_steps=1, ema=0.999, learning_rate=1e-3))
    trainer = ValueTrainer(model, config, make_episodes(16, 0))
    trainer.train()
    assert trainer._average is not None
    after = dict(model.named_parameters())
    for name, average in trainer._average.items():
        moved = after[name].float() != before[name]
        assert (average != before[name])[moved].all(), name


def test_a_decoder_of_text_has_no_unused_weights(tmp_path: Path) -> None:
    model = make_model()
    trainer = ValueTrainer(model, ValueConfig(**settings(tmp_path)), make_episodes(16, 0))
    assert trainer.args.ddp_find_unused_parameters is False
    trainer.value_model(torch.tensor([[0, 300, 5]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
