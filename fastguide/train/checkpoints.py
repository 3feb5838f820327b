"""Continuing a killed run: from a whole checkpoint, of the same run, with what it counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from fastguide.train.settings import LENGTH

STATE_FILE = "trainer_state.json"


def last_checkpoint(folder: Path, marker: str = STATE_FILE) -> str | None:
    """The newest checkpoint of an output folder that was written to its end, ``marker``."""
    whole = [file.parent for file in folder.glob(f"checkpoint-*/{marker}")]
    newest = max(whole, key=lambda f: int(f.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def check_same(checkpoint: str | Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse, by a ValueError, a checkpoint of another run; a run may only be made longer.

    Args:
        checkpoint: its folder.
        theirs: the facts of the checkpoint, ``hyperparameters`` among them.
        ours: those of this run.
    """
    them, us = _flat(theirs), _flat(ours)
    for name in sorted(them.keys() | us.keys()):
        if them.get(name) != us.get(name) and name not in LENGTH:
            raise ValueError(
                f"the checkpoint {checkpoint} has {name} {them.get(name)!r}, this run has "
                f"{us.get(name)!r}; choose another folder or delete it"
            )


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    hyperparameters: dict[str, Any] = facts.get("hyperparameters", {})
    return {name: x for name, x in facts.items() if name != "hyperparameters"} | hyperparameters


def train_from(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint on if there is one; of a finished run the weights are loaded alone.

    transformers takes one step more of a run that ended within an epoch, whenever it is started.
    """
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
        callbacks = trainer.callback_handler.callbacks
        stopped = any(isinstance(c, EarlyStopping) and c.has_stopped(state) for c in callbacks)
        if stopped or state.global_step >= _steps(trainer):
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                trainer._load_best_model()
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def _steps(trainer: Trainer) -> int:
    """Of the whole run."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    return math.ceil(
        args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps))
    )


class EarlyStopping(EarlyStoppingCallback):
    """Counts on from where a checkpoint ended.

    transformers would do so with ``restore_callback_states_from_checkpoint``, but puts the patience
    of the checkpoint in the place of what is asked for.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Take over the count of a state that was loaded."""
        super().on_train_begin(args, state, control, **more)
        self.early_stopping_patience_counter = self._count(state)

    def has_stopped(self, state: TrainerState) -> bool:
        """Whether the run that left this state had lost its patience."""
        return self._count(state) >= self.early_stopping_patience

    def _count(self, state: TrainerState) -> int:
        callbacks: Any = state.stateful_callbacks  # by name, unlike what its type says
        kept = callbacks.get(type(self).__name__)
        return int(kept["attributes"]["early_stopping_patience_counter"]) if kept else 0
