"""From a collection to a guide: split, train, validate, write the folder; and sweeps of that."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from fastguide import assets
from fastguide.files import replacing
from fastguide.models.guide_config import CONFIG_FILE, GuideConfig
from fastguide.models.loading import find_tokenizer
from fastguide.models.value import ValueModel
from fastguide.train.checkpoints import EarlyStopping, train_from
from fastguide.train.collect import ROLLOUTS, check_tokenizer
from fastguide.train.episodes import Episode, mean_return
from fastguide.train.fudge import FudgeConfig, FudgeTrainer, attributes, default_border
from fastguide.train.labels import load_episodes
from fastguide.train.prefix import PrefixTrainer
from fastguide.train.settings import PrefixConfig, measures
from fastguide.train.shards import Shards
from fastguide.train.validation import labels as validation_labels, validate
from fastguide.train.value import ValueConfig, ValueTrainer

RESULTS_FILE = "sweep.json"
MONTE_CARLO = "eval_mc_mse"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to train a guide."""

    config: type[PrefixConfig]
    trainer: type[PrefixTrainer]
    guide: str
    """``GuideConfig.kind``."""
    criterion: str
    """The error against single responses: early stopping goes by it, and a sweep where there is no
    ``MONTE_CARLO``."""


KINDS = {
    "value": Kind(ValueConfig, ValueTrainer, "value", "eval_mse"),
    "fudge": Kind(FudgeConfig, FudgeTrainer, "classifier", "eval_loss"),
}


def split(episodes: Sequence[Episode], held_out: float) -> tuple[list[Episode], list[Episode]]:
    """Training and validation episodes: about a share ``held_out`` of the prompts, by hash.

    All responses to a prompt, and to the same prompt elsewhere in the data, lie on one side.
    """
    train: list[Episode] = []
    valid: list[Episode] = []
    for episode in episodes:
        (valid if is_held_out(episode.prompt_ids, held_out) else train).append(episode)
    return train, valid


def is_held_out(prompt_ids: Sequence[int], share: float) -> bool:
    """Whether a prompt is of the share that is not trained on; so is everyone who asks alike."""
    return zlib.crc32(repr(tuple(prompt_ids)).encode()) / 2**32 < share


def train_guide(
    kind: str,
    data: str | Path,
    base: str | Path,
    config: PrefixConfig,
    *,
    labels: str = "reward",
    held_out: float = 0.05,
    above: float | None = None,
    validation: str | Path | None = None,
    save_dtype: torch.dtype | None = None,
    base_model: str | None = None,
    on_start: Callable[[int, int], None] | None = None,
    callbacks: Sequence[Any] = (),
    **model: Any,
) -> dict[str, float]:
    """Train a guide into ``config.output_dir``; a killed run continues from its last checkpoint.

    Args:
        kind: one of ``KINDS``.
        data: the folder of a collection.
        base: the backbone: path, hub id or packaged name.
        config: of the kind.
        labels: the series of rewards.
        held_out: share of the prompts for validation.
        above: for ``fudge``: a raw reward above this is the attribute; None is ``default_border``.
        validation: a set of ``make_validation``, to measure a value model against as well.
        save_dtype: of the saved weights; None saves them as they are.
        base_model: what the guide says its base is; None is where it was loaded from.
        on_start: told how many episodes there are to train on, and to validate; in the main
            process alone.
        callbacks: of transformers' ``Trainer``.
        model: options of ``ValueModel.create``, such as ``lora_rank`` and ``dtype``.

    Returns:
        The validation metrics, named as in the trainer (``eval_…``), and with ``validation`` the
        error against it as ``eval_mc_mse`` and ``eval_mc_explained_variance``; the same in every
        process.

    Raises:
        ValueError: the data are missing or unfinished, do not vary, a setting is not allowed, or
            the validation set is not for such a guide.
    """
    how = KINDS[kind]
    if not 0.0 <= held_out < 1.0:
        raise ValueError(f"held_out is {held_out}; allowed are numbers from 0 to below 1")
    shards = Shards(data)
    trust = bool(model.get("trust_remote_code", False))
    if (tokenizer := find_tokenizer(base, trust_remote_code=trust)) is not None:
        check_tokenizer(shards, str(base), tokenizer)
    episodes, scale = load_episodes(data, labels)
    if kind == "fudge":
        border = default_border(episodes) if above is None else scale.standardise([above])[0]
        try:
            episodes = attributes(episodes, border)
        except ValueError as error:
            raw = [scale.mean + scale.std * e.reward for e in episodes]
            seen = f"above is {above}, and rewards lie from {min(raw):.4g} to {max(raw):.4g}"
            raise ValueError(f"{error} ({seen})") from error
        above = scale.mean + scale.std * border if above is None else above
    train, valid = split(episodes, held_out)
    if not train:
        raise ValueError(f"held_out is {held_out}, which leaves none of the prompts to train on")
    if not valid and config.eval_strategy != "no":
        raise ValueError(
            f"held_out is {held_out}, which leaves none of the prompts to validate on; stopping "
            "early (--patience) and eval_strategy need some"
        )
    torch.manual_seed(config.seed)
    facts: dict[str, Any] = {
        "policy": shards.about["policy"],
        "sampling": shards.about["sampling"],
        "data": shards.digest(ROLLOUTS, labels),
        "max_tokens": shards.series[labels]["about"]["max_tokens"]
        or shards.about["sampling"]["max_tokens"],
        "held_out": held_out,
        "rollouts": len(episodes),
        "validation_episodes": len(valid),
    }
    if above is not None:
        facts["above"] = above
    targets = {name: getattr(config, name) for name in ("gamma", "lam") if hasattr(config, name)}
    guide = GuideConfig(assets.absolute(base), scale, kind=how.guide, training=facts, **targets)
    if validation is not None:
        validation_labels(validation, guide)  # what does not fit is said before the training
    value = ValueModel.create(base, config=guide, **model)
    if scale.per_token:  # other rewards are 0 in the mean, where a head begins
        value.head.begin_at(mean_return(train, guide.gamma))
    trainer = how.trainer(value, config, train, valid, callbacks=list(callbacks))
    if on_start is not None and trainer.is_world_process_zero():
        on_start(len(train), len(valid))
    train_from(trainer, trainer.last_checkpoint())
    metrics = trainer.evaluate() if valid else {}
    if validation is not None:
        metrics |= _against(validation, value, trainer)
    training = value.config.training | {"validation": measures(metrics)}
    value.config = dataclasses.replace(value.config, training=training)
    if trainer.is_world_process_zero():
        with trainer.averaged():
            value.save_pretrained(config.output_dir or ".", dtype=save_dtype, base_model=base_model)
    trainer.accelerator.wait_for_everyone()
    return metrics


def _against(validation: str | Path, model: ValueModel, trainer: PrefixTrainer) -> dict[str, float]:
    """The Monte-Carlo error, which one process measures and all are told."""
    told: list[Any] = [None]
    if trainer.is_world_process_zero():
        with trainer.averaged():
            found = validate(model.eval(), validation)
        explained = found.explained_variance.mean
        told = [{MONTE_CARLO: found.mse.mean, "eval_mc_explained_variance": explained}]
    measured: dict[str, float] = broadcast_object_list(told)[0]
    return measured


def early_stopping(kind: str, patience: int) -> tuple[dict[str, Any], list[TrainerCallback]]:
    """Settings of a configuration and callbacks: stop after ``patience`` epochs without a gain.

    What is kept are the weights of the best epoch, by the error against single responses to
    held-out prompts, ``Kind.criterion``; a validation set is for whole runs, and sweeps of them.
    """
    if patience < 1:
        raise ValueError(f"patience is {patience}; allowed are whole numbers from 1")
    settings = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": KINDS[kind].criterion,
        "greater_is_better": False,
    }
    return settings, [EarlyStopping(patience)]


def sweep(
    kind: str,
    folder: str | Path,
    grid: Mapping[str, Sequence[Any]],
    train: Callable[[Path, dict[str, Any]], dict[str, float]],
    *,
    about: str = "",
) -> tuple[dict[str, Any], dict[str, float]]:
    """Train with every combination of a grid, and keep the one with the lowest validation error.

    Runs that ended before are not repeated. The best guide is copied to ``folder``, and all
    results are in its ``sweep.json``.

    Args:
        kind: one of ``KINDS``.
        folder: each run has a folder inside.
        grid: settings by name.
        train: trains into a folder with these settings, and returns validation metrics.
        about: what else decides the outcome, such as the data; a run of something else is no run.

    Returns:
        The best settings and their metrics.

    Raises:
        ValueError: a run has no validation metric to choose by, or none ended with a number.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    record, processes = target / RESULTS_FILE, PartialState()
    digest = f" {hashlib.sha256(about.encode()).hexdigest()[:8]}" if about else ""
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    results: list[dict[str, Any]] = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={value}" for key, value in settings.items())
        same = [r for r in known if (r["settings"], r["about"]) == (settings, about)]
        found = same[0] if same else None
        if found is None:
            metrics = train(target / f"{name}{digest}", settings)
            if not {MONTE_CARLO, KINDS[kind].criterion} & set(metrics):
                raise ValueError("a sweep needs an error to choose by: hold some prompts out")
            found = {"settings": settings, "folder": f"{name}{digest}", "metrics": metrics}
            found["about"] = about
            known.append(found)
            if processes.is_main_process:
                with replacing(record) as part:
                    part.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        results.append(found)
    known_by = MONTE_CARLO if MONTE_CARLO in results[0]["metrics"] else KINDS[kind].criterion
    finite = [result for result in results if math.isfinite(result["metrics"][known_by])]
    if not finite:
        raise ValueError(f"none of {len(results)} runs ended with a number as {known_by}")
    best = min(finite, key=lambda result: result["metrics"][known_by])
    if processes.is_main_process:
        ValueModel.clear(target)
        for file in (target / best["folder"]).iterdir():
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    processes.wait_for_everyone()
    assert (target / CONFIG_FILE).is_file()
    return best["settings"], best["metrics"]
