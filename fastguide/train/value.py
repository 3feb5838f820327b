"""Training a value model by TD(lambda) regression (section 2.2 and C.1 of the VAS paper)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastguide.kernels import td_lambda
from fastguide.models.value import ValueModel
from fastguide.train.episodes import Episode, EpisodeBatch, bucketed, collate

CHECKPOINT_FILE = "checkpoint.pt"
LOG_FILE = "log.jsonl"


@dataclasses.dataclass(frozen=True)
class ValueConfig:
    """Hyper-parameters of `ValueTrainer`.

    ``gamma`` and ``lam`` define the targets. The learning rate warms up linearly over
    ``warmup_fraction`` of the steps, then decays by ``schedule`` to ``final_lr_fraction`` of its
    peak. ``ema`` in (0, 1) evaluates and keeps an exponential moving average of the weights
    instead of the last ones. ``bf16`` runs the forward pass under bf16 autocast; weights, values,
    targets and the loss stay fp32. ``eval_every`` and ``checkpoint_every`` count steps; 0 means
    at the end only.
    """

    gamma: float = 1.0
    lam: float = 0.95
    learning_rate: float = 1e-3
    epochs: int = 3
    batch_size: int = 32
    warmup_fraction: float = 0.05
    schedule: str = "cosine"
    final_lr_fraction: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema: float | None = None
    bf16: bool = False
    eval_every: int = 0
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gamma", "lam", "warmup_fraction", "final_lr_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("epochs", "batch_size", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(
                f"schedule must be 'cosine', 'linear' or 'constant', got {self.schedule!r}"
            )
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"ema must be None or lie in (0, 1), got {self.ema}")


def value_loss(values: torch.Tensor, batch: EpisodeBatch, gamma: float, lam: float) -> torch.Tensor:
    """Mean squared error between the states' values and their lambda-returns.

    Targets come from the same values, detached: ``G_T = r_T`` and, before it,
    ``G_t = r_t + gamma * ((1 - lam) * V(s_{t+1}) + lam * G_{t+1})``; most rewards are paid at s_T
    alone.

    Args:
        values: ``[B, T]`` fp32, the model's output for ``batch.input_ids``.
        batch: rows with their state mask and rewards.
        gamma: discount, in [0, 1].
        lam: in [0, 1]; 1 gives Monte-Carlo returns, 0 one-step TD.

    Returns:
        Scalar fp32, averaged over all states of the batch.
    """
    targets = td_lambda(values.detach(), batch.rewards, batch.states, gamma, lam)
    return ((values - targets) ** 2)[batch.states].mean()


class ValueTrainer:
    """Trains the trainable weights of a `ValueModel` on labelled episodes.

    ``folder`` gets a log (one JSON object per line) and, if asked for, a checkpoint; a trainer
    made with the same model, data, configuration and folder continues from that checkpoint and
    ends with the weights of an uninterrupted run.
    """

    def __init__(
        self,
        model: ValueModel,
        config: ValueConfig,
        train: Sequence[Episode],
        valid: Sequence[Episode],
        folder: str | Path,
    ) -> None:
        if not train:
            raise ValueError("training needs at least one episode, got none")
        self.model = model
        self.config = config
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._train, self._valid = train, valid
        self._weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._device = next(iter(self._weights.values())).device
        self._optimizer = torch.optim.AdamW(
            self._weights.values(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self._average = (
            {name: weight.detach().clone() for name, weight in self._weights.items()}
            if config.ema is not None
            else None
        )
        self.step = 0
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self._identity = _identity(config, train, self._weights)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._resume()

    def train(self, until: int | None = None) -> dict[str, float]:
        """Train to the end (or to step ``until``) and return the last validation metrics.

        At the end the model holds the averaged weights if ``ema`` is set.
        """
        end = min(self.total_steps, until if until is not None else self.total_steps)
        metrics: dict[str, float] = {}
        self.model.train()
        started, loss_sum, tokens, count = time.perf_counter(), 0.0, 0, 0
        while self.step < end:
            batch = collate([self._train[i] for i in self._indices(self.step)]).to(self._device)
            loss_sum += self._update(batch)
            tokens, count = tokens + batch.input_ids.numel(), count + 1
            last = self.step == self.total_steps
            if last or (self.config.eval_every and self.step % self.config.eval_every == 0):
                seconds = time.perf_counter() - started
                metrics = self.evaluate()
                self._log(
                    train_loss=loss_sum / count, tokens_per_second=tokens / seconds, **metrics
                )
                started, loss_sum, tokens, count = time.perf_counter(), 0.0, 0, 0
            every = self.config.checkpoint_every
            if self.step == end or (every and self.step % every == 0):
                self._save()
        if self.step == self.total_steps:
            metrics = metrics or self.evaluate()
            if self._average is not None:
                _copy(self._average, self._weights)
        self.model.eval()
        return metrics

    @torch.no_grad()
    def evaluate(self, episodes: Sequence[Episode] | None = None) -> dict[str, float]:
        """Error of the values against the returns of held-out episodes, over all their states.

        Returns:
            ``mse``; ``explained_variance``, 1 - mse / variance of the returns (state-weighted);
            ``terminal_mse``, the error at s_T alone, where the return is certain.
        """
        episodes = self._valid if episodes is None else episodes
        if not episodes:
            return {}
        self.model.eval()
        square = terminal = first = second = states = 0.0
        with self._averaged():
            for chunk in bucketed(episodes, 2 * self.config.batch_size, seed=0):
                batch = collate([episodes[i] for i in chunk]).to(self._device)
                values = self._values(batch)
                returns = td_lambda(values, batch.rewards, batch.states, self.config.gamma, 1.0)
                error = (values - returns) ** 2
                square += error[batch.states].sum().item()
                last = batch.states.sum(dim=1) + batch.states.int().argmax(dim=1) - 1
                terminal += error.gather(1, last[:, None]).sum().item()
                first += returns[batch.states].sum().item()
                second += (returns[batch.states] ** 2).sum().item()
                states += batch.states.sum().item()
        self.model.train()
        variance = second / states - (first / states) ** 2
        mse = square / states
        return {
            "mse": mse,
            "explained_variance": 1 - mse / variance if variance > 0 else 0.0,
            "terminal_mse": terminal / len(episodes),
        }

    def _update(self, batch: EpisodeBatch) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._lr_factor(self.step)
        loss = value_loss(self._values(batch), batch, self.config.gamma, self.config.lam)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights.values(), self.config.max_grad_norm)
        self._optimizer.step()
        self.step += 1
        if self._average is not None and self.config.ema is not None:
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            for name, weight in self._weights.items():
                self._average[name].lerp_(weight.detach(), 1 - decay)
        return loss.item()

    def _values(self, batch: EpisodeBatch) -> torch.Tensor:
        # Padding is on the right of causal rows, so it needs no mask (and attention is faster).
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.config.bf16):
            values: torch.Tensor = self.model(batch.input_ids, None)
        return values.float()

    def _indices(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            seed = self.config.seed * 1_000_003 + epoch
            self._epoch = (epoch, bucketed(self._train, self.config.batch_size, seed))
        return self._epoch[1][place]

    def _lr_factor(self, step: int) -> float:
        warmup = max(1, round(self.config.warmup_fraction * self.total_steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.total_steps - warmup)
        floor = self.config.final_lr_fraction
        if self.config.schedule == "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
        return floor + (1 - floor) * (1 - done) if self.config.schedule == "linear" else 1.0

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model with its averaged weights, if there are any."""
        if self._average is None:
            yield
            return
        current = {name: weight.detach().clone() for name, weight in self._weights.items()}
        _copy(self._average, self._weights)
        try:
            yield
        finally:
            _copy(current, self._weights)

    def _log(self, **entry: float) -> None:
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "of": self.total_steps, **entry}) + "\n")

    def _save(self) -> None:
        state: dict[str, Any] = {
            "identity": self._identity,
            "step": self.step,
            "weights": {name: weight.detach() for name, weight in self._weights.items()},
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
        }
        part = self.folder / (CHECKPOINT_FILE + ".part")
        torch.save(state, part)
        os.replace(part, self.folder / CHECKPOINT_FILE)

    def _resume(self) -> None:
        file = self.folder / CHECKPOINT_FILE
        if not file.is_file():
            return
        state = torch.load(file, map_location=self._device, weights_only=True)
        if state["identity"] != self._identity:
            raise ValueError(
                f"{file} belongs to a run with other data or settings; "
                "choose another folder or delete it"
            )
        _copy(state["weights"], self._weights)
        if self._average is not None:
            self._average = state["average"]
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def _identity(config: ValueConfig, train: Sequence[Episode], weights: Iterable[str]) -> str:
    """Digest of everything that decides the outcome, besides the initial weights."""
    digest = hashlib.sha256(repr((config, sorted(weights))).encode())
    for episode in train:
        digest.update(repr(episode).encode())
    return digest.hexdigest()


@torch.no_grad()
def _copy(source: dict[str, torch.Tensor], target: dict[str, Any]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
