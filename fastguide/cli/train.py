"""``fastguide train``: guides from collections."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastguide import assets
from fastguide.cli import options
from fastguide.cli.collect import policy_of
from fastguide.cli.loading import quiet

if TYPE_CHECKING:
    from fastguide.train.prefix import PrefixConfig

LORA_RANK = 16
FEW = 50
"""Held-out responses below which their error says little."""

train = typer.Typer(help="Train guides on what fastguide collect made.", no_args_is_help=True)


@train.command()
def value(
    data: options.Data,
    out: options.Out,
    labels: options.Labels = "reward",
    model: options.Backbone = None,
    lora_rank: options.LoraRank = None,
    full: options.Full = False,
    freeze: options.Freeze = False,
    head: options.Head = "linear",
    quantize: options.Quantize = None,
    lam: options.Lam = 0.95,
    gamma: options.Gamma = 1.0,
    learning_rate: options.LearningRate = 1e-3,
    epochs: options.Epochs = 3.0,
    batch_size: options.BatchSize = 32,
    ema: options.Ema = None,
    bf16: options.BFloat16 = False,
    patience: options.Patience = None,
    held_out: options.HeldOut = 0.05,
    validation: options.ValidationSet = None,
    seed: options.CollectSeed = 0,
    extra: options.Set = None,
    swept: options.Sweep = None,
) -> None:
    """A value model by TD(λ) (VAS); --lam 1 is Monte-Carlo, --lam 0 one-step TD."""
    given = {"gamma": gamma, "lam": lam, "learning_rate": learning_rate, "ema": ema, "bf16": bf16}
    given |= {"num_train_epochs": epochs, "per_device_train_batch_size": batch_size, "seed": seed}
    backbone = _backbone(lora_rank, full, freeze, head, quantize) | {"validation": validation}
    _train("value", data, out, model, labels, held_out, patience, given, extra, swept, backbone)


@train.command()
def fudge(
    data: options.Data,
    out: options.Out,
    labels: options.Labels = "reward",
    above: options.Above = None,
    model: options.Backbone = None,
    lora_rank: options.LoraRank = None,
    full: options.Full = False,
    freeze: options.Freeze = False,
    head: options.Head = "linear",
    quantize: options.Quantize = None,
    learning_rate: options.LearningRate = 1e-3,
    epochs: options.Epochs = 3.0,
    batch_size: options.BatchSize = 32,
    ema: options.Ema = None,
    bf16: options.BFloat16 = False,
    patience: options.Patience = None,
    held_out: options.HeldOut = 0.05,
    seed: options.CollectSeed = 0,
    extra: options.Set = None,
    swept: options.Sweep = None,
) -> None:
    """A classifier of prefixes (FUDGE): will the finished response have a reward above a border?"""
    given = {"learning_rate": learning_rate, "ema": ema, "bf16": bf16, "seed": seed}
    given |= {"num_train_epochs": epochs, "per_device_train_batch_size": batch_size}
    backbone = _backbone(lora_rank, full, freeze, head, quantize) | {"above": above}
    _train("fudge", data, out, model, labels, held_out, patience, given, extra, swept, backbone)


@train.command()
def reward(
    pairs: options.Pairs,
    out: options.ModelOut,
    model: options.TrainedModel = None,
    lora_rank: options.PairsRank = None,
    learning_rate: options.LearningRate = 1e-4,
    epochs: options.Epochs = 1.0,
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = 1024,
    held_out: options.HeldOutRows = 0.05,
    seed: options.CollectSeed = 0,
    extra: options.Set = None,
) -> None:
    """A reward model from pairs of responses (columns chosen, rejected), with TRL."""
    given = _trl(learning_rate, epochs, batch_size, max_length, seed)
    _prefer("reward", pairs, out, model, lora_rank, held_out, given, extra)


@train.command()
def sft(
    texts: options.Texts,
    out: options.ModelOut,
    model: options.TrainedModel = None,
    lora_rank: options.PairsRank = None,
    learning_rate: options.LearningRate = 1e-4,
    epochs: options.Epochs = 1.0,
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = 1024,
    held_out: options.HeldOutRows = 0.05,
    seed: options.CollectSeed = 0,
    extra: options.Set = None,
) -> None:
    """A policy fine-tuned on texts (column text), with TRL."""
    given = _trl(learning_rate, epochs, batch_size, max_length, seed)
    _prefer("sft", texts, out, model, lora_rank, held_out, given, extra)


def _trl(
    learning_rate: float, epochs: float, batch_size: int, max_length: int, seed: int
) -> dict[str, Any]:
    return {
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "max_length": max_length,
        "seed": seed,
        "report_to": "none",
    }


def _prefer(
    kind: str,
    files: Sequence[str],
    out: str,
    model: str | None,
    lora_rank: int | None,
    held_out: float,
    given: dict[str, Any],
    extra: Sequence[str] | None,
) -> None:
    if given["max_length"] < 1:
        raise ValueError(f"--max-length is {given['max_length']}; allowed are numbers from 1")
    with quiet():
        import torch

        from fastguide.train.preferences import read_rows, train_reward, train_sft, trl

    config_class = trl().RewardConfig if kind == "reward" else trl().SFTConfig
    fields = {field.name for field in dataclasses.fields(config_class)}
    given |= {"bf16": torch.cuda.is_available()}  # TRL's default wants a GPU
    given |= dict(_setting(text, fields) for text in extra or [])
    run = train_reward if kind == "reward" else train_sft
    with quiet():
        import datasets

        datasets.disable_progress_bars()
        rows = read_rows(kind, files)
        typer.echo(f"{len(rows)} rows; checkpoints in {out}")
        config = config_class(output_dir=out, **given)
        metrics = run(rows, model or assets.MODEL, config, lora_rank=lora_rank, held_out=held_out)
    shown = [
        f"{name} {metrics[f'eval_{name}']:.4f}"
        for name in ("loss", "accuracy", "margin")
        if f"eval_{name}" in metrics
    ]
    typer.echo(f"model in {out}" + (f"; held out: {', '.join(shown)}" if shown else ""))


def _backbone(
    lora_rank: int | None, full: bool, freeze: bool, head: str, quantize: str | None
) -> dict[str, Any]:
    given = {"--full": full, "--freeze": freeze, "--lora-rank": lora_rank is not None}
    if len(both := [name for name, is_given in given.items() if is_given]) > 1:
        raise ValueError(f"{' and '.join(both)} are both given; allowed is one of them")
    rank = None if full or freeze else LORA_RANK if lora_rank is None else lora_rank
    found: dict[str, Any] = {"lora_rank": rank, "freeze": freeze}
    if quantize is not None:
        from fastguide.models.quantization import quantization

        found["quantization"] = quantization(quantize)
    return found | {"head": head}


def _train(
    kind: str,
    data: str,
    out: str,
    model: str | None,
    labels: str,
    held_out: float,
    patience: int | None,
    given: dict[str, Any],
    extra: Sequence[str] | None,
    swept: Sequence[str] | None,
    options: dict[str, Any],
) -> None:
    from fastguide.train.collect import ROLLOUTS
    from fastguide.train.guides import KINDS, early_stopping, sweep, train_guide
    from fastguide.train.shards import Shards

    backbone = model or policy_of(Shards(data))
    more, callbacks = early_stopping(kind, patience) if patience is not None else ({}, [])
    given |= more
    fields = {field.name for field in dataclasses.fields(KINDS[kind].config)}
    given |= dict(_setting(text, fields) for text in extra or [])

    def run(folder: Path, more: dict[str, Any]) -> dict[str, float]:
        config: PrefixConfig = KINDS[kind].config(output_dir=str(folder), **(given | more))
        return train_guide(
            kind,
            data,
            backbone,
            config,
            labels=labels,
            held_out=held_out,
            callbacks=list(callbacks),
            on_start=lambda train, valid: _say_start(train, valid, held_out, folder),
            **options,
        )

    if swept:
        grid = dict(_values(text, fields) for text in swept)
        about = f"{Shards(data).digest(ROLLOUTS, labels)} {backbone} {held_out} {given} {options}"
        best, metrics = sweep(kind, out, grid, run, about=about)
        chosen = ", ".join(f"{name} {value}" for name, value in best.items())
        typer.echo(f"best of the sweep: {chosen}")
    else:
        metrics = run(Path(out), {})
    shown = "mse explained_variance mc_mse mc_explained_variance loss accuracy majority".split()
    found = [f"{n} {metrics[f'eval_{n}']:.4f}" for n in shown if f"eval_{n}" in metrics]
    typer.echo(f"guide in {out}" + (f"; on held-out prompts: {', '.join(found)}" if found else ""))


def _say_start(train: int, valid: int, held_out: float, folder: Path) -> None:
    typer.echo(f"{train} responses to train on, {valid} to validate; checkpoints in {folder}")
    if held_out and valid < FEW:
        typer.echo("few to validate on: their error says little; --held-out takes a larger share")


def _setting(text: str, fields: set[str], option: str = "--set") -> tuple[str, Any]:
    """``NAME=VALUE``, of any field of the configuration."""
    name, equals, value = text.partition("=")
    name = {"lr": "learning_rate"}.get(name, name)
    if not equals or name not in fields - {"output_dir"}:
        near = difflib.get_close_matches(name, fields, n=1)
        meant = near[0] if near else "gradient_accumulation_steps"
        raise ValueError(
            f"{option} is {text!r}; allowed is NAME=VALUE with a name of transformers' "
            f"TrainingArguments, such as {meant}"
        )
    return name, _literal(value)


def _values(text: str, fields: set[str]) -> tuple[str, list[Any]]:
    """``NAME=VALUE,VALUE``, what a sweep goes through."""
    name, value = _setting(text, fields, "--sweep")
    if isinstance(value, tuple):
        return name, list(value)
    return name, [_literal(part) for part in str(value).split(",")]


def _literal(text: str) -> Any:
    """A number, True, False or None, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
