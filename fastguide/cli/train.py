"""``fastguide train``: guides from collections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from fastguide import assets
from fastguide.cli import options
from fastguide.cli.collect import policy_of
from fastguide.cli.loading import quiet
from fastguide.cli.settings import configured, fields_of, read_settings, swept_values

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
    lora_alpha: options.LoraAlpha = None,
    full: options.Full = False,
    freeze: options.Freeze = False,
    head: options.Head = "linear",
    quantize: options.Quantize = None,
    dtype: options.BackboneDtype = None,
    trust_remote_code: options.BackboneCode = False,
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
    backbone = _backbone(
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        full=full,
        freeze=freeze,
        head=head,
        quantize=quantize,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    _train(
        "value",
        data,
        out,
        model,
        config=given,
        extra=extra,
        swept=swept,
        patience=patience,
        labels=labels,
        held_out=held_out,
        validation=validation,
        **backbone,
    )


@train.command()
def fudge(
    data: options.Data,
    out: options.Out,
    labels: options.Labels = "reward",
    above: options.Above = None,
    model: options.Backbone = None,
    lora_rank: options.LoraRank = None,
    lora_alpha: options.LoraAlpha = None,
    full: options.Full = False,
    freeze: options.Freeze = False,
    head: options.Head = "linear",
    quantize: options.Quantize = None,
    dtype: options.BackboneDtype = None,
    trust_remote_code: options.BackboneCode = False,
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
    backbone = _backbone(
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        full=full,
        freeze=freeze,
        head=head,
        quantize=quantize,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    _train(
        "fudge",
        data,
        out,
        model,
        config=given,
        extra=extra,
        swept=swept,
        patience=patience,
        labels=labels,
        held_out=held_out,
        above=above,
        **backbone,
    )


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
    _prefer(
        "reward",
        pairs,
        out,
        model,
        config=given,
        extra=extra,
        lora_rank=lora_rank,
        held_out=held_out,
    )


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
    _prefer(
        "sft",
        texts,
        out,
        model,
        config=given,
        extra=extra,
        lora_rank=lora_rank,
        held_out=held_out,
    )


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
    *,
    config: dict[str, Any],
    extra: Sequence[str] | None,
    **options: Any,
) -> None:
    """Train by TRL and say what came out; ``options`` are of ``train_reward``."""
    if config["max_length"] < 1:
        raise ValueError(f"--max-length is {config['max_length']}; allowed are numbers from 1")
    with quiet():
        import torch

        from fastguide.train.preferences import read_rows, train_reward, train_sft, trl

    config_class = trl().RewardConfig if kind == "reward" else trl().SFTConfig
    given = config | {"bf16": torch.cuda.is_available()}  # TRL's default wants a GPU
    given |= read_settings(extra, fields_of(config_class), "--set")
    run = train_reward if kind == "reward" else train_sft
    with quiet():
        import datasets

        datasets.disable_progress_bars()
        rows = read_rows(kind, files)
        settings = configured(config_class, {"output_dir": out, **given})
        _say(f"{len(rows)} rows; checkpoints in {out}")
        metrics = run(rows, model or assets.MODEL, settings, **options)
    shown = [
        f"{name} {metrics[f'eval_{name}']:.4f}"
        for name in ("loss", "accuracy", "margin")
        if f"eval_{name}" in metrics
    ]
    _say(f"model in {out}" + (f"; held out: {', '.join(shown)}" if shown else ""))


def _backbone(
    *,
    lora_rank: int | None,
    lora_alpha: int | None,
    full: bool,
    freeze: bool,
    head: str,
    quantize: str | None,
    dtype: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Options of ``ValueModel.create``."""
    given = {"--full": full, "--freeze": freeze, "--lora-rank": lora_rank is not None}
    if len(both := [name for name, is_given in given.items() if is_given]) > 1:
        raise ValueError(f"{' and '.join(both)} are both given; allowed is one of them")
    if lora_alpha is not None and (full or freeze):
        raise ValueError(f"--lora-alpha is {lora_alpha}; allowed with a LoRA (--lora-rank)")
    rank = None if full or freeze else LORA_RANK if lora_rank is None else lora_rank
    found: dict[str, Any] = {"lora_rank": rank, "lora_alpha": lora_alpha, "freeze": freeze}
    if quantize is not None:
        from fastguide.models.quantization import quantization

        found["quantization"] = quantization(quantize)
    if dtype is not None:
        from fastguide.models.loading import resolve_dtype

        found["dtype"] = None if dtype == "auto" else resolve_dtype(dtype)
    return found | {"head": head, "trust_remote_code": trust_remote_code}


def _train(
    kind: str,
    data: str,
    out: str,
    model: str | None,
    *,
    config: dict[str, Any],
    extra: Sequence[str] | None,
    swept: Sequence[str] | None,
    patience: int | None,
    **options: Any,
) -> None:
    """Train a guide, or sweep, and say what came out; ``options`` are of ``train_guide``."""
    from fastguide.train.collect import ROLLOUTS
    from fastguide.train.guides import KINDS, early_stopping, sweep, train_guide
    from fastguide.train.shards import Shards

    backbone = model or policy_of(Shards(data))
    stopping, callbacks = early_stopping(kind, patience) if patience is not None else ({}, [])
    fields = fields_of(KINDS[kind].config)
    given = config | stopping | read_settings(extra, fields, "--set")

    def run(folder: Path, more: dict[str, Any]) -> dict[str, float]:
        settings = {"output_dir": str(folder), **given, **more}
        return train_guide(
            kind,
            data,
            backbone,
            configured(KINDS[kind].config, settings),
            callbacks=list(callbacks),
            on_start=lambda train, valid: _say_start(train, valid, options["held_out"], folder),
            **options,
        )

    if swept:
        grid = {
            name: swept_values(x) for name, x in read_settings(swept, fields, "--sweep").items()
        }
        for name in sorted(grid.keys() & read_settings(extra, fields, "--set").keys()):
            raise ValueError(f"{name} is given by --set and --sweep; allowed is one of them")
        about = f"{Shards(data).digest(ROLLOUTS, options['labels'])} {backbone} {given} {options}"
        best, metrics = sweep(kind, out, grid, run, about=about)
        chosen = ", ".join(f"{name} {value}" for name, value in best.items())
        _say(f"best of the sweep: {chosen}")
    else:
        metrics = run(Path(out), {})
    shown = "mse explained_variance mc_mse mc_explained_variance loss accuracy majority".split()
    found = [f"{n} {metrics[f'eval_{n}']:.4f}" for n in shown if f"eval_{n}" in metrics]
    _say(f"guide in {out}" + (f"; on held-out prompts: {', '.join(found)}" if found else ""))


def _say(text: str) -> None:
    """Print, in one of the processes."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(text)


def _say_start(train: int, valid: int, held_out: float, folder: Path) -> None:
    typer.echo(f"{train} responses to train on, {valid} to validate; checkpoints in {folder}")
    if held_out and valid < FEW:
        typer.echo("few to validate on: their error says little; --held-out takes a larger share")
