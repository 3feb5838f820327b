"""Real training runs on the packaged model: they learn, and they resume exactly."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from fastguide.models.value import ValueModel
from fastguide.train.episodes import Episode, bucketed
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


def make_model() -> ValueModel:
    torch.manual_seed(0)
    return ValueModel.create("stories", lora_rank=4)


CONFIG = ValueConfig(
    learning_rate=3e-3, epochs=3, batch_size=16, ema=0.9, lam=0.95, eval_every=4, seed=1
)


def test_training_lowers_the_validation_error(tmp_path: Path) -> None:
    trainer = ValueTrainer(
        make_model(), CONFIG, make_episodes(192, 0), make_episodes(48, 1), tmp_path
    )
    before = trainer.evaluate()
    assert before["mse"] == pytest.approx(1.0)  # a head at zero predicts 0; rewards are +-1
    after = trainer.train()
    assert after["mse"] < 0.5
    assert after["explained_variance"] > 0.5
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(4, 37, 4))
    assert log[-1]["mse"] == after["mse"]
    # The model holds the averaged weights that were evaluated.
    assert trainer.evaluate()["mse"] == pytest.approx(after["mse"], rel=1e-4)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    train, valid = make_episodes(96, 0), make_episodes(16, 1)
    straight = make_model()
    ValueTrainer(straight, CONFIG, train, valid, tmp_path / "straight").train()
    for until in (5, 11, None):
        resumed = make_model()
        trainer = ValueTrainer(resumed, CONFIG, train, valid, tmp_path / "resumed")
        trainer.train(until)
    assert trainer.step == 18
    weights = dict(straight.named_parameters())
    for name, weight in resumed.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-7, msg=name)


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    train = make_episodes(32, 0)
    ValueTrainer(make_model(), CONFIG, train, [], tmp_path).train(until=1)
    with pytest.raises(ValueError, match="other data or settings"):
        ValueTrainer(make_model(), CONFIG, make_episodes(32, 5), [], tmp_path)


def test_batches_hold_every_episode_once_and_like_lengths() -> None:
    episodes = make_episodes(100, 2)
    batches = bucketed(episodes, 8, seed=0)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert bucketed(episodes, 8, seed=0) == batches != bucketed(episodes, 8, seed=1)
    spread = [max(len(episodes[i]) for i in b) - min(len(episodes[i]) for i in b) for b in batches]
    assert sum(spread) / len(spread) <= 2


@pytest.mark.parametrize(
    "wrong", [{"lam": 1.5}, {"epochs": 0}, {"schedule": "step"}, {"ema": 1.0}, {"gamma": -0.1}]
)
def test_wrong_settings_name_themselves(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ValueConfig(**wrong)  # type: ignore[arg-type]
