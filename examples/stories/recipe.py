"""Make the packaged models again: base, rollouts, labels, guides, export, report and cards.

    python examples/stories/recipe.py

Stages that are done are skipped, and a killed stage continues where it was. Everything in between
lies under ``runs/stories``; delete that folder to begin anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from cards import write_base_card, write_guide_cards
from pretrain import pretrain, sample_stories
from prompts import read_stories, training_prompts

from fastguide import Engine
from fastguide.models.value import GuideConfig, ValueModel
from fastguide.rewards import load_reward
from fastguide.train.collect import CollectConfig, collect
from fastguide.train.episodes import Episode
from fastguide.train.labels import label, load_episodes
from fastguide.train.value import ValueConfig, ValueTrainer

ROOT = Path(__file__).resolve().parents[2]
BASE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
ROLLOUTS = CollectConfig(
    samples_per_prompt=2, max_tokens=320, temperature=0.7, seed=0, shard_prompts=1500
)


@dataclasses.dataclass(frozen=True)
class Guide:
    """What is trained for one packaged guide."""

    name: str
    reward: str
    max_tokens: int
    lora_rank: int
    attention: str  # the faster implementation for training on CPU at this length
    epochs: int
    ema: float


GUIDES = (
    Guide("cheerful", "cheerfulness", 128, lora_rank=16, attention="eager", epochs=2, ema=0.99),
    Guide("brief", "brevity", 320, lora_rank=16, attention="sdpa", epochs=1, ema=0.98),
)


def training(guide: Guide, folder: Path) -> ValueConfig:
    """How a guide is trained."""
    return ValueConfig(
        output_dir=str(folder),
        learning_rate=1e-3,
        num_train_epochs=guide.epochs,
        per_device_train_batch_size=32,
        ema=guide.ema,
        bf16=True,
        use_cpu=True,
        logging_steps=90,
        eval_strategy="steps",
        eval_steps=180,
        save_strategy="steps",
        save_steps=90,
    )


def main() -> None:
    """Run all stages; see ``--help``."""
    options = _parse()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    assets: Path = options.assets
    _stage("base model", lambda: make_base(options, assets / "stories"))
    _stage("rollouts", lambda: make_rollouts(options, assets / "stories"))
    for guide in GUIDES:
        if options.only in (None, guide.name):
            _stage(guide.name, lambda guide=guide: make_guide(guide, options))
    if not options.no_report:
        import report

        _stage("report", lambda: report.run(options.data, assets, options.threads))
    write_guide_cards(assets)


def make_base(options: argparse.Namespace, target: Path) -> None:
    """The packaged base model: a copy of ``--model``, or one trained from nothing."""
    source: Path = options.model
    if options.from_scratch:
        source = options.work / "base"
        if not (source / "done").is_file():
            train, valid = (read_stories(options.data / f"{n}.txt") for n in ("train", "valid"))
            sampled: list[str] = []
            if options.sampled:
                file = options.work / "sampled.json"
                sampled = sample_stories(options.teacher, options.sampled, file)
            pretrain(train, valid, source, epochs=options.base_epochs, sampled=sampled)
            (source / "done").touch()
    target.mkdir(parents=True, exist_ok=True)
    for name in BASE_FILES:
        new, old = source / name, target / name
        if not (old.is_file() and filecmp.cmp(new, old, shallow=False)):
            shutil.copyfile(new, old)
    write_base_card(target, options.work / "pretrain.jsonl" if options.from_scratch else None)


def make_rollouts(options: argparse.Namespace, base: Path) -> None:
    """Unguided responses of up to 320 tokens; both rewards are labelled on them."""
    engine = Engine(base, guides={}, max_rows=options.max_rows)
    stories = read_stories(options.data / "train.txt")
    texts = training_prompts(stories, options.prompts, seed=ROLLOUTS.seed)
    prompts = [list(ids) for ids in engine.tokenizer(texts).input_ids]
    shard = ROLLOUTS.shard_prompts * ROLLOUTS.samples_per_prompt
    started = time.perf_counter()

    def on_progress(done: int, of: int) -> None:
        if done % shard == 0:
            minutes = (time.perf_counter() - started) / 60
            print(f"  {done} of {of} responses, {minutes:.1f} min", flush=True)

    policy = f"stories-{_checksum(base)}"
    work = options.work / "rollouts"
    collect(engine, prompts, work, ROLLOUTS, policy=policy, on_progress=on_progress)


def make_guide(guide: Guide, options: argparse.Namespace) -> None:
    """Label, train and export one guide."""
    folder, base = options.work / guide.name, options.assets / "stories"
    rollouts = options.work / "rollouts"
    tokenizer = Engine(base, guides={}).tokenizer

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    reward = load_reward(guide.reward)
    shards = label(rollouts, reward, decode, name=guide.name, max_tokens=guide.max_tokens)
    made_from = repr((guide, shards.series[guide.name], _checksum(base)))
    done = folder / "done"
    if done.is_file() and done.read_text(encoding="utf-8") == made_from:
        return
    episodes, scale = load_episodes(rollouts, guide.name)
    train, valid = split(episodes)
    settings = training(guide, folder)
    torch.manual_seed(settings.seed)
    config = GuideConfig(str(base), scale, settings.gamma, settings.lam)
    model = ValueModel.create(
        base, lora_rank=guide.lora_rank, config=config, attn_implementation=guide.attention
    )
    trainer = ValueTrainer(model, settings, train, valid)
    print(f"  {len(train)} episodes; checkpoints in {folder}", flush=True)
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
    metrics = trainer.evaluate()
    facts = {
        "rollouts": len(episodes),
        "max_tokens": guide.max_tokens,
        "temperature": ROLLOUTS.temperature,
        "validation_episodes": len(valid),
        **{
            name: round(metrics[f"eval_{name}"], 4)
            for name in ("mse", "explained_variance", "terminal_mse")
        },
        "hyperparameters": {
            "learning_rate": settings.learning_rate,
            "epochs": guide.epochs,
            "batch_size": settings.per_device_train_batch_size,
            "schedule": str(settings.lr_scheduler_type.value),
            "warmup_fraction": settings.warmup_steps,
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "ema": settings.ema,
            "seed": settings.seed,
        },
    }
    model.config = dataclasses.replace(config, training=facts)
    target = options.assets / guide.name
    with trainer.averaged():
        model.save_pretrained(target, dtype=torch.bfloat16, base_model="../stories")
    done.write_text(made_from, encoding="utf-8")


def split(episodes: list[Episode]) -> tuple[list[Episode], list[Episode]]:
    """Training and validation episodes: about a twentieth of the prompts, by hash, is held out."""
    train, valid = [], []
    for episode in episodes:
        held = zlib.crc32(repr(episode.prompt_ids).encode()) % 20 == 0
        (valid if held else train).append(episode)
    return train, valid


def _checksum(base: Path) -> str:
    return f"{zlib.crc32((base / 'model.safetensors').read_bytes()):08x}"


def _stage(name: str, work) -> None:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    print(f"{name} …", flush=True)
    work()
    print(f"{name}: {(time.perf_counter() - started) / 60:.1f} min", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="make the packaged story models again")
    shared = ROOT.parent / "shared"
    add = parser.add_argument
    add("--data", type=Path, default=shared / "data/stories", help="train.txt and valid.txt")
    add("--model", type=Path, default=shared / "models/stories5m", help="base model to copy")
    add("--from-scratch", action="store_true", help="train the base model on the data instead")
    add("--base-epochs", type=int, default=8, help="epochs of --from-scratch")
    add("--sampled", type=int, default=7500, help="stories of --teacher to train on as well")
    add("--teacher", type=Path, default=shared / "models/stories260k", help="tells them")
    add("--prompts", type=int, default=9000, help="training prompts, two responses each")
    add("--only", choices=[guide.name for guide in GUIDES], help="train this guide only")
    add("--no-report", action="store_true", help="do not measure the guides at the end")
    add("--work", type=Path, default=ROOT / "runs/stories", help="folder of unfinished work")
    add("--assets", type=Path, default=ROOT / "fastguide/assets", help="folder of the results")
    add("--max-rows", type=int, default=64, help="responses sampled together")
    add("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    needed = [options.data / "train.txt", options.data / "valid.txt"]
    needed += [] if options.from_scratch else [options.model / "model.safetensors"]
    if absent := [str(file) for file in needed if not file.is_file()]:
        print(f"missing: {', '.join(absent)} (see --data and --model)", file=sys.stderr)
        raise SystemExit(2)
    return options


if __name__ == "__main__":
    main()
