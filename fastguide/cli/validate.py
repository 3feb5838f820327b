"""``fastguide validate``: value guides against Monte-Carlo values of half-finished responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from fastguide import assets
from fastguide.cli import options
from fastguide.cli.collect import policy_of
from fastguide.cli.loading import load_engine


def validate(
    folder: options.ValidationOut,
    guides: options.GuideFolders = None,
    data: options.ValidationData = None,
    labels: options.Labels = "reward",
    held_out: options.HeldOut = 0.05,
    prompts: options.ValidationPrompts = 64,
    completions: options.Completions = 10,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.CollectSeed = 0,
    max_rows: options.MaxRows = 64,
) -> None:
    """Measure values against the mean reward of many completions.

    With --data it first makes the set, from responses to prompts that training holds out.
    """
    if prompts < 1:
        raise ValueError(f"--prompts is {prompts}; allowed are whole numbers from 1")
    if completions < 2:
        raise ValueError(
            f"--completions is {completions}; allowed are whole numbers from 2: their spread tells "
            "the noise of the labels"
        )
    if data is None and not guides:
        raise ValueError("neither --data nor a guide is given; allowed are either and both")
    if data is not None:
        _make(
            folder,
            data,
            model,
            labels=labels,
            held_out=held_out,
            prompts=prompts,
            completions=completions,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            max_rows=max_rows,
        )
    for name in guides or []:
        _measure(name, folder, device, trust_remote_code)


def _make(
    folder: str,
    data: str,
    model: str | None,
    *,
    labels: str,
    held_out: float,
    prompts: int,
    completions: int,
    seed: int,
    device: str | None,
    trust_remote_code: bool,
    **engine_options: Any,
) -> None:
    """Make a validation set and say how large it is."""
    from fastguide.engine.progress import progress
    from fastguide.engine.text import decoder
    from fastguide.rewards import load_reward
    from fastguide.train.collect import read
    from fastguide.train.guides import is_held_out
    from fastguide.train.labels import check_labels
    from fastguide.train.shards import Shards
    from fastguide.train.validation import has_halves, make_validation, measurable

    check_labels(labels)
    shards = Shards(data)
    next(shards.rows(labels))  # they are there, and whole
    about = shards.series[labels]["about"]
    reward = load_reward(about["spec"], device=device, trust_remote_code=trust_remote_code)
    chosen = [r for r in read(data) if r.sample == 0 and is_held_out(r.prompt_ids, held_out)]
    if not chosen:
        raise ValueError(f"--held-out {held_out} holds none of the prompts of {data} out")
    chosen = [r for r in chosen if has_halves(r)]
    sampling = shards.about["sampling"]
    engine = load_engine(
        model or policy_of(shards),
        [],
        device=device,
        trust_remote_code=trust_remote_code,
        **engine_options,
    )
    if engine.policy != shards.about["policy"]:
        raise ValueError(
            f"{data} is of the policy {shards.about['policy']}, not of {engine.policy}; "
            "name its model with --model, and its --dtype"
        )
    total = min(prompts, len(chosen)) * completions
    with progress(total, wanted=True, what="completions") as note:
        made = make_validation(
            engine,
            chosen[:prompts],
            folder,
            reward,
            decoder(engine.tokenizer),
            max_tokens=about["max_tokens"] or sampling["max_tokens"],
            completions=completions,
            temperature=sampling["temperature"],
            held_out=held_out,
            seed=seed,
            on_progress=lambda done, _: note(done),
        )
    found = measurable(made)
    few = f" ({prompts} were asked for)" if found < prompts else ""
    typer.echo(f"validation set of {found} prefixes in {made.folder}{few}")


def _measure(name: str, folder: str, device: str | None, trust_remote_code: bool) -> None:
    import torch

    from fastguide.models.loading import resolve_device
    from fastguide.models.value import ValueModel
    from fastguide.train.validation import validate

    model = ValueModel.from_pretrained(
        assets.resolve(name),
        dtype=torch.float32,
        merge=True,
        device=resolve_device(device),
        trust_remote_code=trust_remote_code,
    )
    found = validate(model, Path(folder))
    mse, explained = (
        f"{x.mean:.3f} [{x.low:.3f}, {x.high:.3f}]" for x in (found.mse, found.explained_variance)
    )
    typer.echo(
        f"{name}: MSE {mse} variances of the reward, explained variance {explained}; of the error "
        f"{found.noise:.3f} is noise of the {found.prefixes} labels"
    )
