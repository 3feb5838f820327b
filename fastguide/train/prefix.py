"""What all training of prefix scores shares: data, averaging, validation, checkpoints, resuming.

``PrefixTrainer`` is transformers' ``Trainer`` with another loss, so gradient accumulation, mixed
precision, early stopping, several processes, TensorBoard and the rest are used as they are there.
A checkpoint is a guide folder with the optimizer beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from fastguide.models.guide_config import GuideConfig
from fastguide.models.value import ValueModel
from fastguide.train.checkpoints import check_same, last_checkpoint
from fastguide.train.episodes import Episode, EpisodeBatch, bucketed, collate
from fastguide.train.settings import HYPERPARAMETERS, PrefixConfig, settings_of

AVERAGE_FILE = "average.safetensors"


class Episodes(Dataset):
    """Episodes as a dataset of transformers' trainer."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.episodes = episodes

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Episode:
        return self.episodes[index]


class LengthSampler(Sampler[int]):
    """Every index once an epoch, in batches of like length, in an order of the epoch alone."""

    def __init__(self, episodes: Sequence[Episode], batch_size: int, pool: int, seed: int) -> None:
        self._episodes, self._batch_size, self._pool = episodes, batch_size, pool
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._episodes)

    def __iter__(self) -> Iterator[int]:
        seed = self._seed * 1_000_003 + self._epoch
        for batch in bucketed(self._episodes, self._batch_size, seed, self._pool):
            yield from batch


class _Trained(nn.Module):
    """The model as ``Trainer`` gets it: without a config, which it would change."""

    def __init__(self, model: ValueModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        # Padding is on the right of causal rows, so it needs no mask (and attention is faster).
        values: Tensor = self.model(input_ids)
        return values

    # transformers calls it by the first name, and up to 5.17 by the second, as its models are.
    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.model.backbone.activation_checkpointing_enable(**options)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.model.backbone.gradient_checkpointing_enable(**options)  # type: ignore[operator]


class PrefixTrainer(Trainer):
    """Trains a ``ValueModel``'s numbers for all prefixes of episodes; see the subclasses.

    Args:
        model: what of it requires a gradient is trained.
        args: the configuration.
        train_dataset: episodes.
        eval_dataset: held-out episodes, for ``evaluate`` and ``eval_strategy``.
        callbacks: as in ``Trainer``, such as ``EarlyStoppingCallback``.
        optimizers: as in ``Trainer``.

    Raises:
        ValueError: no episodes, or nothing to train.
    """

    def __init__(
        self,
        model: ValueModel,
        args: PrefixConfig,
        train_dataset: Sequence[Episode],
        eval_dataset: Sequence[Episode] = (),
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not train_dataset:
            raise ValueError("training needs at least one episode, got none")
        self._weights: dict[str, Tensor] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        if not self._weights:
            raise ValueError("the model has no weights that require a gradient")
        if args.ddp_find_unused_parameters is None:
            # A decoder of text uses all its weights in every step; looking for others takes time.
            config: Any = model.backbone.config
            args.ddp_find_unused_parameters = config.get_text_config() is not config
        super().__init__(
            model=_Trained(model),
            args=args,
            data_collator=_collate,
            train_dataset=Episodes(train_dataset),
            # Like lengths together; their order changes no metric.
            eval_dataset=Episodes(sorted(eval_dataset, key=len)) if eval_dataset else None,
            compute_metrics=self._metrics,
            callbacks=[*(callbacks or [])],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # so that ``compute_loss`` is told the count
        self.value_model = model
        trained = sum(weight.numel() for weight in self._weights.values())
        facts = model.config.training | _facts(args, model, trained)
        model.config = dataclasses.replace(model.config, training=facts)
        self._average: dict[str, Tensor] | None = None
        if args.ema is not None:
            # In fp32: what it moves by would be rounded away in less.
            self._average = {n: p.detach().float().clone() for n, p in self._weights.items()}
            self.add_callback(_Averaging(self._average, self._weights, args.ema))

    # ------------------------------------------------------------------ what a subclass says

    def losses(self, values: Tensor, batch: EpisodeBatch) -> Tensor:
        """``[states]``: the loss of each state of the batch, from ``values [B, T]`` fp32."""
        raise NotImplementedError

    def statistics(self, values: Tensor, batch: EpisodeBatch) -> Tensor:
        """``[B, S]`` numbers of each episode, whose sums over all episodes ``metrics`` gets."""
        raise NotImplementedError

    def metrics(self, sums: Sequence[float], states: int, episodes: int) -> dict[str, float]:
        """Validation metrics from the ``[S]`` sums over so many states of so many episodes."""
        raise NotImplementedError

    # -------------------------------------------------------------------- what Trainer calls

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in ``Trainer``: the mean over the states of all parts of a step, on all processes."""
        batch = EpisodeBatch(**inputs)
        values = model(batch.input_ids).float()
        losses = self.losses(values, batch)
        loss = losses.mean()
        if num_items_in_batch is not None:  # gradients of the processes are averaged afterwards
            loss = losses.sum() / num_items_in_batch * self.args.world_size
        return (loss, values) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor]:
        """As in ``Trainer``, which counts labels: here states count."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        counts = [sample["states"].sum() for sample in samples]
        counted = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64)
        return samples, self.accelerator.gather(counted.to(self.args.device)).sum()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, statistics and, because ``Trainer`` wants some, labels."""
        batch = EpisodeBatch(**self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            values = model(batch.input_ids).float()
            losses = self.losses(values, batch)
            at_states = torch.zeros_like(values).masked_scatter(batch.states, losses)
            counted = torch.stack([at_states.double().sum(1), batch.states.double().sum(1)], dim=1)
            found = torch.cat([counted, self.statistics(values, batch)], dim=1)
        return losses.mean(), found, found[:, 0]

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """``loss`` over all states, in the place of a mean of batches' means, and the others."""
        rows = np.asarray(prediction.predictions)
        loss, states, *sums = rows.sum(axis=0)
        return {"loss": float(loss / states), **self.metrics(sums, int(states), len(rows))}

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        assert isinstance(self.train_dataset, Episodes)
        rows = self.args.train_batch_size * self.args.world_size
        pool = self.args.length_pool  # type: ignore[attr-defined]
        return LengthSampler(self.train_dataset.episodes, rows, pool, self.args.seed)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in ``Trainer``, with the averaged weights if there are any."""
        with self.averaged():
            return super().evaluate(*args, **kwargs)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, if there are any."""
        if self._average is None:
            yield
            return
        last = {name: weight.detach().clone() for name, weight in self._weights.items()}
        _copy(self._average, self._weights)
        try:
            yield
        finally:
            _copy(last, self._weights)

    # -------------------------------------------------------------------------- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the guide folder; with averaged weights, unless it is for a checkpoint."""
        with contextlib.nullcontext() if _internal_call else self.averaged():
            super().save_model(output_dir, _internal_call)
        if _internal_call and self._average is not None and self.args.should_save:
            assert output_dir is not None
            save_file(self._average, Path(output_dir) / AVERAGE_FILE)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.value_model.save_pretrained(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        check_same(folder, _run(GuideConfig.load(folder)), _run(self.value_model.config))
        self.value_model.load_folder(folder)
        if self._average is not None:
            device = next(iter(self._weights.values())).device
            for name, tensor in load_file(folder / AVERAGE_FILE).items():
                self._average[name].copy_(tensor.to(device))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint)).name
        self._load_from_checkpoint(str(Path(str(self.args.output_dir)) / best))

    def last_checkpoint(self) -> str | None:
        """See ``last_checkpoint``."""
        return last_checkpoint(Path(str(self.args.output_dir)))


def _facts(args: PrefixConfig, model: ValueModel, trained: int) -> dict[str, Any]:
    """What a guide's config says of its training."""
    backbone: Any = model.backbone
    facts: dict[str, Any] = {
        "hyperparameters": settings_of(args, HYPERPARAMETERS),
        "trained_parameters": trained,
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
    if (adapters := getattr(backbone, "peft_config", None)) is not None:
        lora = adapters["default"]
        facts["lora"] = {"rank": lora.r, "alpha": lora.lora_alpha}
    return facts


def _run(config: GuideConfig) -> dict[str, Any]:
    """What decides how a run goes on."""
    names = ("base_model", "reward", "gamma", "lam", "kind", "head")
    return {name: getattr(config, name) for name in names} | config.training


class _Averaging(TrainerCallback):
    """Moves the average after every step; young averages move faster."""

    def __init__(self, average: dict[str, Tensor], weights: dict[str, Tensor], decay: float):
        self._average, self._weights, self._decay = average, weights, decay

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        decay = min(self._decay, (1 + state.global_step) / (10 + state.global_step))
        with torch.no_grad():
            for name, weight in self._weights.items():
                self._average[name].lerp_(weight.detach().float(), 1 - decay)


def _collate(episodes: Sequence[Episode]) -> dict[str, Tensor]:
    return collate(episodes)._asdict()


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
