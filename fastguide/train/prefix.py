"""What all training of prefix scores shares: data, averaging, validation, checkpoints, resuming.

``PrefixTrainer`` is transformers' ``Trainer`` with another loss, so gradient accumulation, mixed
precision, early stopping, several processes, TensorBoard and the rest are used as they are there.
A checkpoint is a guide folder with the optimizer beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_callback import TrainerControl, TrainerState

from fastguide.models.guide_config import GuideConfig
from fastguide.models.value import ValueModel
from fastguide.train.episodes import Episode, EpisodeBatch, bucketed, collate

AVERAGE_FILE = "average.safetensors"
STATE_FILE = "trainer_state.json"


NUMBERS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "ema",
    "length_pool",
)
"""Settings that are checked before transformers sees them."""


@dataclasses.dataclass
class PrefixConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with other defaults, and two fields more.

    Attributes:
        ema: decay of an exponential moving average of the weights, in (0, 1), which is what is
            validated and saved; None keeps the last weights.
        length_pool: batches that are sorted by length together, so that rows of a batch are alike.
    """

    learning_rate: float = 1e-3
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    logging_steps: float = 10
    report_to: str | list[str] | None = "none"
    save_total_limit: int | None = 2
    remove_unused_columns: bool = False
    ema: float | None = None
    length_pool: int = 32

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, Real):
                raise ValueError(f"{name} is {value!r}; allowed are numbers")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}; allowed is more than 0")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; allowed are whole numbers from 1"
                )
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; allowed is 0 or more")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"ema must be None or lie in (0, 1), got {self.ema}")
        if self.length_pool < 1:
            raise ValueError(f"length_pool must be at least 1, got {self.length_pool}")
        super().__post_init__()
        check_reports(self)
        if not torch.cuda.is_available():  # else every run begins with a warning
            self.dataloader_pin_memory = False


def check_reports(config: TrainingArguments) -> None:
    """Refuse, by an ImportError, a logger that is not installed."""
    wanted = [config.report_to] if isinstance(config.report_to, str) else config.report_to or []
    missing = sorted({*wanted} - {*get_available_reporting_integrations(), "none", "all"})
    if missing:
        raise ImportError(
            f"report_to is {missing[0]!r}, which is not installed: pip install {missing[0]}"
        )


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of an output folder that was written to its end."""
    whole = [file.parent for file in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    newest = max(whole, key=lambda f: int(f.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


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
        super().__init__(
            model=_Trained(model),
            args=args,
            data_collator=_collate,
            train_dataset=Episodes(train_dataset),
            # Like lengths together; their order changes no metric.
            eval_dataset=Episodes(sorted(eval_dataset, key=len)) if eval_dataset else None,
            compute_metrics=self.metrics,
            callbacks=[*(callbacks or [])],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # so that ``compute_loss`` is told the count
        self.value_model = model
        facts = model.config.training | _facts(args, self._weights)
        model.config = dataclasses.replace(model.config, training=facts)
        self._average: dict[str, Tensor] | None = None
        if args.ema is not None:
            self._average = {n: p.detach().clone() for n, p in self._weights.items()}
            self.add_callback(_Averaging(self._average, self._weights, args.ema))

    # ------------------------------------------------------------------ what a subclass says

    def losses(self, values: Tensor, batch: EpisodeBatch) -> Tensor:
        """``[states]``: the loss of each state of the batch, from ``values [B, T]`` fp32."""
        raise NotImplementedError

    def statistics(self, values: Tensor, batch: EpisodeBatch) -> Tensor:
        """``[B, S]`` numbers of each episode, whose sums over all episodes ``metrics`` gets."""
        raise NotImplementedError

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Validation metrics from the statistics ``[episodes, S]``."""
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
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, values = self.compute_loss(model, inputs, return_outputs=True)
            found = self.statistics(values, EpisodeBatch(**inputs))
        return loss.detach(), found, found[:, 0]

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
        theirs, ours = _flat(GuideConfig.load(folder)), _flat(self.value_model.config)
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name) and name not in LENGTH:
                raise ValueError(
                    f"the checkpoint {folder} has {name} {theirs.get(name)!r}, this run has "
                    f"{ours.get(name)!r}; choose another folder or delete it"
                )
        self.value_model.load_folder(folder)
        if self._average is not None:
            device = next(iter(self._weights.values())).device
            for name, tensor in load_file(folder / AVERAGE_FILE).items():
                self._average[name].copy_(tensor.to(device))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def last_checkpoint(self) -> str | None:
        """See ``last_checkpoint``."""
        return last_checkpoint(Path(str(self.args.output_dir)))


HYPERPARAMETERS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "ema",
    "length_pool",
    "bf16",
    "fp16",
    "seed",
)
"""What a guide's config says of its training."""

LENGTH = ("num_train_epochs", "max_steps")
"""Those that may change when a run is continued: it may go on for longer."""


def _facts(args: PrefixConfig, weights: dict[str, Tensor]) -> dict[str, Any]:
    found = {name: getattr(args, name) for name in HYPERPARAMETERS}
    plain = {name: str(getattr(v, "value", v)) for name, v in found.items() if hasattr(v, "value")}
    trained = sum(weight.numel() for weight in weights.values())
    return {"hyperparameters": found | plain, "trained_parameters": trained}


def _flat(config: GuideConfig) -> dict[str, Any]:
    """What decides how a run goes on."""
    training = dict(config.training)
    hyperparameters = training.pop("hyperparameters", {})
    names = ("base_model", "reward", "gamma", "lam", "kind")
    return {name: getattr(config, name) for name in names} | training | hyperparameters


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
                self._average[name].lerp_(weight.detach(), 1 - decay)


def _collate(episodes: Sequence[Episode]) -> dict[str, Tensor]:
    return collate(episodes)._asdict()


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
