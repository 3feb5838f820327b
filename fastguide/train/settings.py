"""Configurations of training: those of transformers, checked before it sees them."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable
from numbers import Real
from types import NoneType
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

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

SPLITTING = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
"""Settings, and variables of ``accelerate launch``, that cut weights in parts."""

PACKAGES = {"azure_ml": "azureml-core"}
"""Packages of loggers that have another name."""

UNASKED = {"none", "all", "flyte"}
"""What ``report_to`` may be, whatever is installed; flyte sees to it itself."""


@dataclasses.dataclass
class PrefixConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with other defaults, and two fields more.

    Attributes:
        ema: decay of an exponential moving average of the weights, in (0, 1), which is what is
            validated and saved; None keeps the last weights.
        length_pool: batches that are sorted by length together, so that rows of a batch are alike.

    Raises:
        ValueError: a setting is of another type or out of its range, or cuts weights in parts.
        ImportError: a logger is not installed.
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
        check_numbers(type(self), vars(self))
        check_whole(self)
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
        if not torch.accelerator.is_available():  # else several processes would not find each other
            self.use_cpu = True
        super().__post_init__()
        check_processes(self)
        check_reports(self)
        if not torch.cuda.is_available():  # else every run begins with a warning
            self.dataloader_pin_memory = False


def check_numbers(config: type, given: dict[str, Any]) -> None:
    """Refuse, by a ValueError, what is no number where a configuration's class wants one.

    transformers compares such values before it looks at them, or uses them hours later.
    """
    for name, hint in typing.get_type_hints(config).items():
        allowed = set(typing.get_args(hint) or [hint])
        if name not in given or not allowed <= {int, float, bool, NoneType}:
            continue
        value = given[name]
        if not isinstance(value, Real) and not (value is None and NoneType in allowed):
            kinds = "True and False" if bool in allowed else "numbers"
            raise ValueError(f"{name} is {value!r}; allowed are {kinds}")


def check_processes(config: TrainingArguments) -> None:
    """Refuse, by a ValueError, processes that were started together and do not know each other.

    Each would train on everything, and all of them into one folder.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if config.world_size != started:
        raise ValueError(
            f"{started} processes were started, of which each knows {config.world_size}; on a CPU, "
            "use_cpu=True lets them find each other"
        )


def check_whole(config: TrainingArguments) -> None:
    """Refuse, by a ValueError, what cuts weights in parts: they are averaged and saved whole."""
    for name, variable in SPLITTING.items():
        if getattr(config, name, None) or parse_flag_from_env(variable):
            raise ValueError(
                f"{name} is asked for, which cuts weights in parts; allowed are processes that "
                "each hold all of them (DDP)"
            )


def check_reports(config: TrainingArguments) -> None:
    """Refuse a logger that there is not, by a ValueError; by an ImportError, one not installed."""
    wanted = [config.report_to] if isinstance(config.report_to, str) else config.report_to or []
    missing = sorted({*wanted} - {*get_available_reporting_integrations()} - UNASKED)
    for name in missing:
        if name not in INTEGRATION_TO_CALLBACK:
            allowed = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to is {name!r}; allowed are none, all, {allowed}")
        package = PACKAGES.get(name, name)
        raise ImportError(f"report_to is {name!r}, which is not installed: pip install {package}")


def settings_of(config: TrainingArguments, names: Iterable[str]) -> dict[str, Any]:
    """Those settings that a configuration has, as plain data."""
    found = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return {name: getattr(value, "value", value) for name, value in found.items()}  # of enums


TIMING = ("runtime", "per_second", "preparation_time", "epoch")


def measures(metrics: dict[str, float]) -> dict[str, float]:
    """What a trainer's validation found, without its times, as a model's record has it."""
    return {
        name.removeprefix("eval_"): round(value, 6)
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.endswith(TIMING)
    }
