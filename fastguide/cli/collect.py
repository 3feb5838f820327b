"""``fastguide collect`` and ``fastguide label``: responses of the policy, and their rewards."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from fastguide.cli import options
from fastguide.cli.arguments import parse_memory, read_prompts
from fastguide.cli.loading import chosen_dtype, load_engine
from fastguide.prompts import as_chat
from fastguide.rewards import Reward, load_reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastguide.train.collect import CollectConfig
    from fastguide.train.shards import Shards


MOST_REASONS = 5
"""Samples without a reward that are named."""


def collect(
    out: options.Folder,
    prompts: options.Prompts = None,
    source: options.Input = None,
    rewards: options.Rewards = None,
    name: options.Labels = "reward",
    chat: options.Chat = False,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    samples: options.Samples = 2,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Warmth = 0.7,
    seed: options.CollectSeed = 0,
    shard: options.ShardPrompts = 256,
    max_rows: options.MaxRows = 64,
    kv_memory: options.KvMemory = None,
    ray: options.Ray = False,
    workers: options.Workers = 1,
    gpus: options.Gpus = 0.0,
) -> None:
    """Sample responses to prompts and judge them.

    Killed at any moment and started again, it continues: nothing is lost, nothing is there twice.
    """
    from fastguide.engine.progress import progress
    from fastguide.train.collect import CollectConfig, collect

    for option, given, usual in (("--workers", workers, 1), ("--gpus", gpus, 0)):
        if given != usual and not ray:
            raise ValueError(f"{option} is {given:g}; allowed with --ray")
    if device is not None and ray:
        raise ValueError(f"--device is {device!r}; allowed without --ray, which takes --gpus")
    texts = read_prompts(prompts or [], source)
    memory = parse_memory(kv_memory)
    config = CollectConfig(samples, max_tokens, temperature, seed, shard)
    if ray:
        _with_ray(
            out,
            model,
            texts,
            config,
            chat=chat,
            rewards=rewards,
            name=name,
            dtype=dtype,
            max_rows=max_rows,
            kv_memory=memory,
            trust_remote_code=trust_remote_code,
            workers=workers,
            gpus=gpus,
        )
        return
    judges = _rewards(rewards, device, trust_remote_code)
    engine = load_engine(
        model,
        [],
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        max_rows=max_rows,
        kv_memory=memory,
    )
    ids = _encode(engine.tokenizer, texts, chat)
    try:
        with progress(len(ids) * samples, wanted=True, what="responses") as note:
            shards = collect(
                engine,
                ids,
                out,
                config,
                policy=engine.policy,
                texts=texts if chat else None,
                on_progress=lambda done, _: note(done),
            )
    except KeyboardInterrupt:
        _say_interrupted(out, len(ids) * samples)
        raise
    _say_collected(shards)
    if judges is not None:
        _label(shards, judges, engine.tokenizer, name, None)
    else:
        _say_unjudged(shards)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], chat: bool) -> list[list[int]]:
    if chat:
        from fastguide.engine.text import encode

        return [encode(tokenizer, as_chat(text)) for text in texts]
    return list(tokenizer(texts).input_ids)


def _with_ray(
    out: str,
    model: str | None,
    texts: list[str],
    config: CollectConfig,
    *,
    chat: bool,
    rewards: Sequence[str] | None,
    name: str,
    dtype: str | None,
    max_rows: int,
    kv_memory: int | float | None,
    trust_remote_code: bool,
    **each: Any,
) -> None:
    """Collect, and judge if there are rewards; ``each`` says how many workers, and their GPUs."""
    from fastguide import assets
    from fastguide.engine.progress import progress
    from fastguide.models.loading import load_tokenizer
    from fastguide.train.collect import responses_of
    from fastguide.train.ray_data import collect_with_ray, label_with_ray

    if rewards:  # mistakes are told before anything is sampled
        load_reward(rewards, trust_remote_code=trust_remote_code, weights=False)
    path = assets.resolve(model or assets.MODEL)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    ids = _encode(tokenizer, texts, chat)
    total = len(ids) * config.samples_per_prompt
    engine = {
        "dtype": chosen_dtype(model, dtype),
        "max_rows": max_rows,
        "kv_memory": kv_memory,
        "trust_remote_code": trust_remote_code,
    }
    with progress(total, wanted=True, what="responses") as note:
        shards = collect_with_ray(
            path,
            ids,
            out,
            config,
            texts=texts if chat else None,
            options=engine,
            on_progress=lambda done, _: note(done),
            **each,
        )
    _say_collected(shards)
    if rewards:
        total = responses_of(shards)
        with progress(total, wanted=True, what="rewards") as note:
            shards = label_with_ray(
                out,
                rewards,
                path,
                name=name,
                trust_remote_code=trust_remote_code,
                on_progress=lambda done, _: note(done),
                **each,
            )
        _say(shards, total, name)
    else:
        _say_unjudged(shards)


def policy_of(shards: Shards) -> str:
    """Where the policy of a collection is, as it says itself."""
    from fastguide import assets

    return str(shards.notes.get("model", assets.MODEL))


def _say_collected(shards: Shards) -> None:
    from fastguide.train.collect import ROLLOUTS, failures, responses_of

    failed, rows = failures(shards, ROLLOUTS), responses_of(shards)
    left_out = f"; {failed} of prompts that are empty or too long are left out" if failed else ""
    typer.echo(f"{rows} responses of {shards.about['policy']} in {shards.folder}{left_out}")


def _say_unjudged(shards: Shards) -> None:
    if len(shards.series) == 1:
        folder = shards.folder
        typer.echo(f"not judged yet; for example: fastguide label {folder} --reward cheerfulness")


def _say_interrupted(folder: str, of: int) -> None:
    from fastguide.train.collect import kept
    from fastguide.train.shards import Shards

    done = 0
    with contextlib.suppress(ValueError):  # before anything was begun
        done = kept(Shards(folder))
    note = f"{done} of {of} responses are in {folder}; the same command continues"
    typer.echo(f"interrupted: {note}", err=True)


def label(
    folder: options.Folder,
    rewards: options.Rewards = None,
    name: options.Labels = "reward",
    model: options.Model = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    max_tokens: options.JudgedTokens = None,
) -> None:
    """Judge the responses of a collection by another reward.

    A folder may hold several, under names of their own; responses may be cut before (--max-tokens).
    """
    judges = _rewards(rewards, device, trust_remote_code)
    if judges is None:
        raise ValueError("no --reward is given; for example --reward cheerfulness")
    from fastguide.models.loading import load_tokenizer
    from fastguide.train.collect import check_tokenizer
    from fastguide.train.shards import Shards

    shards = Shards(folder)
    policy = model or policy_of(shards)
    tokenizer = load_tokenizer(policy, trust_remote_code=trust_remote_code)
    check_tokenizer(shards, policy, tokenizer)
    _label(shards, judges, tokenizer, name, max_tokens)


def _rewards(specs: Sequence[str] | None, device: str | None, trust: bool) -> Reward | None:
    return load_reward(specs, device=device, trust_remote_code=trust) if specs else None


def _label(
    shards: Shards,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    max_tokens: int | None,
) -> None:
    from fastguide.engine.progress import progress
    from fastguide.engine.text import decoder
    from fastguide.train.collect import responses_of
    from fastguide.train.labels import label

    total = responses_of(shards)
    with progress(total, wanted=True, what="rewards") as note:
        shards = label(
            shards.folder,
            reward,
            decoder(tokenizer),
            name=name,
            max_tokens=max_tokens,
            on_progress=lambda done, _: note(done),
        )
    _say(shards, total, name)


def _say(shards: Shards, total: int, name: str) -> None:
    from fastguide.train.collect import failures
    from fastguide.train.labels import reasons

    failed, reward = failures(shards, name), shards.series[name]["about"]["reward"]
    left_out = f"; {failed} could not be judged and are left out, such as" if failed else ""
    typer.echo(f"{total - failed} rewards ({reward}) as {name!r} in {shards.folder}{left_out}")
    for reason in reasons(shards, name)[:MOST_REASONS]:
        typer.echo(f"  {reason}")
