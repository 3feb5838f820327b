"""Reward models from pairs of responses, and policies from texts, through TRL's trainers.

A reward model learns ``-log sigmoid(r(chosen) - r(rejected))`` (Bradley-Terry). Its folder is a
sequence classifier with one label: ``RewardGuide`` decodes with it (ARGS), ``classifier:PATH``
judges with it. The folder and each checkpoint hold a record of what they were trained on, and a
checkpoint of something else is not continued.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import TrainerControl, TrainerState

from fastguide.assets import absolute, resolve
from fastguide.files import replacing
from fastguide.models.loading import load_tokenizer, one_line
from fastguide.train.checkpoints import check_same, last_checkpoint, train_from
from fastguide.train.settings import (
    HYPERPARAMETERS,
    check_processes,
    check_reports,
    check_whole,
    measures,
    settings_of,
)

RECORD_FILE = "training.json"
"""What a model was trained on, beside it and in each of its checkpoints."""

RECORDED = (
    *HYPERPARAMETERS,
    "max_length",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "center_rewards_coefficient",
    "disable_dropout",
    "loss_type",
    "packing",
    "packing_strategy",
    "assistant_only_loss",
    "completion_only_loss",
    "dataset_text_field",
    "eos_token",
    "pad_token",
    "chat_template_path",
)
"""Settings of TRL's configurations that decide the outcome, where they have them."""

COLUMNS: dict[str, list[tuple[str, ...]]] = {
    "reward": [("chosen", "rejected")],
    "sft": [("text",), ("messages",)],
}
"""What the files of each kind must hold, one or the other; ``reward`` may have a ``prompt``."""


def trl() -> Any:
    """The ``trl`` package, or how to get it."""
    try:
        import trl
    except ImportError as error:
        raise ImportError("this needs TRL: pip install 'fastguide[trl]'") from error
    return trl


def read_rows(kind: str, files: Sequence[str | Path]) -> Any:
    """A ``datasets.Dataset`` of JSON lines (``.jsonl``, ``.jsonl.gz``) or Parquet files.

    Raises:
        ValueError: a file is missing or of another type, or lacks a column.
    """
    trl()
    import datasets

    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {str(path)!r}")
    parquet = [path.suffix == ".parquet" for path in paths]
    if any(parquet) and not all(parquet):
        raise ValueError("some files are Parquet and some are not; allowed is one type at a time")
    if empty := [str(path) for path in paths if path.stat().st_size == 0]:
        raise ValueError(f"{empty[0]!r} is empty; needed are rows")
    loader = "parquet" if all(parquet) else "json"
    names = [str(path) for path in paths]
    try:
        rows: Any = datasets.load_dataset(loader, data_files=names, split="train")
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"cannot read rows from {', '.join(names)}: {reason}") from error
    for needed in COLUMNS[kind]:
        if set(needed) <= set(rows.column_names):
            return rows.select_columns([n for n in (*needed, "prompt") if n in rows.column_names])
    allowed = " or ".join(" and ".join(needed) for needed in COLUMNS[kind])
    raise ValueError(f"the rows have {', '.join(rows.column_names)}; needed are {allowed}")


def train_reward(
    rows: Any,
    base: str | Path,
    config: Any,
    *,
    lora_rank: int | None = None,
    held_out: float = 0.05,
    attn_implementation: str | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, float]:
    """Train a reward model on pairs, into ``config.output_dir``; a killed run continues.

    Args:
        rows: see ``read_rows``.
        base: a decoder: path, hub id or packaged name.
        config: ``trl.RewardConfig``.
        lora_rank: train a LoRA of that rank, merged at the end; None trains all weights.
        held_out: share of the pairs for validation.
        attn_implementation: as in transformers; None leaves the choice to it.
        callbacks: of transformers' ``Trainer``.

    Returns:
        Validation metrics, named as TRL does (``eval_accuracy`` and so on).

    Raises:
        ValueError: the folder has a checkpoint of other rows, another base or other settings, or
            a setting cannot be used.
    """
    from transformers import AutoModelForSequenceClassification

    record = _record("reward", rows, base, config, lora_rank=lora_rank, held_out=held_out)
    checkpoint = _begun(config, record)
    tokenizer, where = load_tokenizer(base), resolve(base)
    _pad(tokenizer)
    torch.manual_seed(config.seed)  # of the head
    with warnings.catch_warnings():  # the head is new: that is the point
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(
            where,
            num_labels=1,
            dtype="float32",
            use_safetensors=True,
            attn_implementation=attn_implementation,
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = trl().RewardTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        callbacks=[*callbacks, _Recording(record)],
        peft_config=_lora(lora_rank, "SEQ_CLS", modules_to_save=["score"]),
        **_split(_tokens(rows, tokenizer, config.max_length), held_out, config.seed),
    )
    return _finish(trainer, tokenizer, record, checkpoint)


def train_sft(
    rows: Any,
    base: str | Path,
    config: Any,
    *,
    lora_rank: int | None = None,
    held_out: float = 0.05,
    attn_implementation: str | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, float]:
    """Fine-tune a policy on texts, into ``config.output_dir``; see ``train_reward``.

    ``config`` is ``trl.SFTConfig``.
    """
    from transformers import AutoModelForCausalLM

    record = _record("sft", rows, base, config, lora_rank=lora_rank, held_out=held_out)
    checkpoint = _begun(config, record)
    tokenizer, where = load_tokenizer(base), resolve(base)
    _pad(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype="float32", use_safetensors=True, attn_implementation=attn_implementation
    )
    trainer = trl().SFTTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        callbacks=[*callbacks, _Recording(record)],
        peft_config=_lora(lora_rank, "CAUSAL_LM"),
        **_split(rows, held_out, config.seed),
    )
    return _finish(trainer, tokenizer, record, checkpoint)


def _record(
    kind: str, rows: Any, base: str | Path, config: Any, *, lora_rank: int | None, held_out: float
) -> dict[str, Any]:
    """What decides the outcome of a training."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return {
        "kind": kind,
        "base_model": absolute(base),
        "rows": len(rows),
        "sha256": digest.hexdigest(),
        "held_out": held_out,
        "lora_rank": lora_rank,
        "hyperparameters": settings_of(config, RECORDED),
    }


def _begun(config: Any, record: dict[str, Any]) -> str | None:
    """The checkpoint to continue from, if there is one; before anything is loaded.

    Raises:
        ValueError: it is of another training, or a setting cannot be used.
    """
    check_reports(config)
    check_whole(config)
    check_processes(config)
    found = last_checkpoint(Path(config.output_dir), RECORD_FILE)
    if found is not None:
        theirs = json.loads((Path(found) / RECORD_FILE).read_text(encoding="utf-8"))
        check_same(found, theirs, record)
    return found


class _Recording(TrainerCallback):
    """Writes the record into each checkpoint once that is whole."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            _write(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self._record)


def _write(folder: Path, record: dict[str, Any]) -> None:
    with replacing(folder / RECORD_FILE) as part:
        part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _no_card(*_: Any, **__: Any) -> None:
    """In place of a trainer's card."""


def _tokens(rows: Any, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Any:
    """Pairs as token ids: the texts as they are.

    TRL would end each with an end of text, which guides and rewards of unfinished texts never
    see, and drop long ones, which here lose their beginning, as ``ClassifierReward`` reads them.
    """

    def ids(prompt: Any, response: Any) -> list[int]:
        if isinstance(response, str):
            found = tokenizer((prompt or "") + response).input_ids
        else:
            messages = [*(prompt or []), *response]
            chat: Any = tokenizer.apply_chat_template(messages, return_dict=True)
            found = chat["input_ids"]
        return list(found[-longest:] if longest else found)

    def pair(row: dict[str, Any]) -> dict[str, list[int]]:
        return {f"{side}_ids": ids(row.get("prompt"), row[side]) for side in ("chosen", "rejected")}

    return rows.map(pair, remove_columns=rows.column_names, desc="tokens")


def _pad(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def _lora(rank: int | None, task: str, **more: Any) -> Any:
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", bias="none", task_type=task, **more
    )


def _split(rows: Any, held_out: float, seed: int) -> dict[str, Any]:
    if not held_out:
        return {"train_dataset": rows}
    parts = rows.train_test_split(held_out, seed=seed)
    return {"train_dataset": parts["train"], "eval_dataset": parts["test"]}


def _finish(
    trainer: Any,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    checkpoint: str | None,
) -> dict[str, float]:
    folder = Path(trainer.args.output_dir)
    trainer.create_model_card = _no_card  # TRL's names neither the base nor the data here
    train_from(trainer, checkpoint)
    metrics: dict[str, float] = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not isinstance(model, PreTrainedModel):  # a LoRA: guides read whole classifiers
            model = model.merge_and_unload()
        (folder / RECORD_FILE).unlink(missing_ok=True)  # while the model is another, none is right
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write(folder, record | {"validation": measures(metrics)})
    return metrics
