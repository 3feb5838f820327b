"""Early stopping: a killed run stops where it would have, and a finished one has finished."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small import make_episodes, make_model, settings
from transformers import TrainerCallback

from fastguide.models.value import ValueModel
from fastguide.train.checkpoints import train_from
from fastguide.train.guides import early_stopping
from fastguide.train.value import ValueConfig, ValueTrainer

EPOCH = 4
"""Steps of an epoch."""


class Kill(TrainerCallback):
    """Ends the process at a step, and counts how many there were."""

    def __init__(self, step: int | None = None) -> None:
        self.step, self.steps = step, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(folder: Path, patience: int = 2, kill: Kill | None = None) -> tuple[ValueModel, Any]:
    """Train on what the validation set contradicts, so that the first epoch is the best."""
    train, valid = make_episodes(16 * EPOCH, 0), make_episodes(32, 1)
    valid = [dataclasses.replace(e, reward=-e.reward) for e in valid]
    more, callbacks = early_stopping("value", patience)
    config = ValueConfig(**settings(folder, num_train_epochs=8, ema=0.9, **more))
    model = make_model()
    callbacks = [*callbacks, kill or Kill()]
    trainer = ValueTrainer(model, config, train, valid, callbacks=callbacks)
    train_from(trainer, trainer.last_checkpoint())
    return model, trainer


def assert_same(one: ValueModel, other: ValueModel) -> None:
    weights = dict(one.named_parameters())
    for name, weight in other.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0, msg=name)


def test_a_killed_run_stops_where_it_would_have(tmp_path: Path) -> None:
    model, trainer = run(tmp_path / "straight")
    assert trainer.state.global_step == 3 * EPOCH
    with pytest.raises(KeyboardInterrupt):  # one epoch without a gain has been counted
        run(tmp_path / "killed", kill=Kill(2 * EPOCH + 2))
    resumed, again = run(tmp_path / "killed")
    assert again.state.global_step == 3 * EPOCH
    assert_same(resumed, model)
    assert again.evaluate()["eval_mse"] == trainer.evaluate()["eval_mse"]


def test_a_finished_run_trains_nothing_and_keeps_the_best(tmp_path: Path) -> None:
    model, trainer = run(tmp_path)
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
    counted = Kill()
    same, again = run(tmp_path, kill=counted)
    assert counted.steps == 0
    assert_same(same, model)
    assert again.evaluate()["eval_mse"] == trainer.evaluate()["eval_mse"]
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()} == files
    # Whoever has more patience goes on.
    _, longer = run(tmp_path, patience=3, kill=counted)
    assert counted.steps == EPOCH
    assert longer.state.global_step == 4 * EPOCH


def test_a_finished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path, patience=1)
    more, callbacks = early_stopping("value", 1)
    config = ValueConfig(**settings(tmp_path, num_train_epochs=8, ema=0.5, **more))
    trainer = ValueTrainer(
        make_model(), config, make_episodes(64, 0), make_episodes(32, 1), callbacks=callbacks
    )
    with pytest.raises(ValueError, match=r"has ema 0\.9, this run has 0\.5"):
        train_from(trainer, trainer.last_checkpoint())


@pytest.mark.parametrize(
    "length", [{"max_steps": 6}, {"num_train_epochs": 1.5}, {"num_train_epochs": 1}]
)
def test_a_run_that_ended_within_an_epoch_has_ended(
    tmp_path: Path, length: dict[str, float]
) -> None:
    config = ValueConfig(**settings(tmp_path, **({"save_strategy": "epoch"} | length)))
    models, counted = [], Kill()
    for _ in range(2):
        model = make_model()
        trainer = ValueTrainer(model, config, make_episodes(16 * EPOCH, 0), callbacks=[counted])
        train_from(trainer, trainer.last_checkpoint())
        models.append(model)
    assert (
        counted.steps
        == trainer.state.global_step
        == (4 if length == {"num_train_epochs": 1} else 6)
    )
    assert_same(*models)
