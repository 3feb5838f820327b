"""What the experiments share: responses, training and measuring in parallel, results.

Everything is a job with a folder of its own under ``--work``; what is done there is not done again,
so a killed experiment continues, and experiments share what they have in common.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples/stories"))

from prompts import heldout_prompts, read_stories, training_prompts  # noqa: E402

from fastguide import Engine, SamplingParams  # noqa: E402
from fastguide.engine.text import decoder  # noqa: E402
from fastguide.evaluate import Point, Runner, Study  # noqa: E402
from fastguide.evaluate.differences import differences  # noqa: E402
from fastguide.evaluate.metrics import Estimate  # noqa: E402
from fastguide.evaluate.report import pooled, table  # noqa: E402
from fastguide.models.value import ValueModel  # noqa: E402
from fastguide.rewards import load_reward  # noqa: E402
from fastguide.train.collect import CollectConfig, collect, read  # noqa: E402
from fastguide.train.fudge import FudgeConfig  # noqa: E402
from fastguide.train.guides import early_stopping, train_guide  # noqa: E402
from fastguide.train.labels import label  # noqa: E402
from fastguide.train.validation import make_validation, squared_errors, validate  # noqa: E402
from fastguide.train.value import ValueConfig  # noqa: E402

Job = Callable[[], Any]
TEMPERATURE = 0.7
BATCH = 32
KLS = (1.0, 2.0, 3.0, 4.0, 8.0)
"""At which methods are compared, in nats per response."""


def options(title: str, flags: Mapping[str, str] | None = None, **more: int) -> argparse.Namespace:
    """The command line of an experiment.

    Args:
        title: what ``--help`` says.
        flags: further switches, and what they do.
        more: further numbers with their defaults.
    """
    parser = argparse.ArgumentParser(description=title)
    add = parser.add_argument
    stories = ROOT.parent / "shared/data/stories"
    add("--data", type=Path, default=stories, help="folder of train.txt and valid.txt")
    add("--work", type=Path, default=ROOT / "runs/experiments", help="folder of unfinished work")
    add("--results", type=Path, default=ROOT / "docs/results", help="folder of the results")
    numbers = {"prompts": 6000, "judged": 64, "seeds": 3, "processes": os.cpu_count() or 1}
    for name, default in (numbers | more).items():
        add(f"--{name}", type=int, default=default, help=f"default {default}")
    for name, what in (flags or {}).items():
        add(f"--{name}", action="store_true", help=what)
    return parser.parse_args()


def parallel(jobs: Sequence[Job], processes: int) -> None:
    """Run all jobs, each in a process with its share of the cores; the longest should come first.

    Several small jobs at once use two cores better than one job on both.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Says what is going on, and how long it took."""
    started = time.perf_counter()
    print(f"{name} …", flush=True)
    yield
    print(f"{name}: {(time.perf_counter() - started) / 60:.1f} min", flush=True)


# ------------------------------------------------------------------------------- responses


def held_out(asked: argparse.Namespace) -> list[str]:
    """The prompts that studies judge on."""
    return heldout_prompts(read_stories(asked.data / "valid.txt"), asked.judged)


def other_held_out(asked: argparse.Namespace) -> list[str]:
    """As many others as ``--halves`` says, for Monte-Carlo validation."""
    prompts = heldout_prompts(read_stories(asked.data / "valid.txt"), asked.judged + asked.halves)
    return prompts[asked.judged :]


def responses(
    stories: Path, folder: Path, prompts: int, max_tokens: int, rewards: Mapping[str, str]
) -> None:
    """Two unguided responses to each of ``prompts`` openings of stories, judged by ``rewards``.

    These are given by name, and so are their labels.
    The responses to fewer openings are the first of those to more.
    """
    engine = Engine("stories", guides={}, max_rows=128)
    ids = engine.tokenizer(training_prompts(read_stories(stories), prompts, seed=1)).input_ids
    config = CollectConfig(samples_per_prompt=2, max_tokens=max_tokens, seed=1)
    collect(engine, ids, folder, config, policy=engine.policy)
    for name, reward in rewards.items():
        label(folder, load_reward(reward), decoder(engine.tokenizer), name=name)


def monte_carlo(
    prompts: Sequence[str], folder: Path, max_tokens: int, reward: str, completions: int = 10
) -> None:
    """Halves of responses to held-out prompts, each finished ``completions`` times and judged."""
    engine = Engine("stories", guides={}, max_rows=128)
    ids = engine.tokenizer(list(prompts)).input_ids
    config = CollectConfig(samples_per_prompt=1, max_tokens=max_tokens, seed=2)
    source = folder.with_name(f"{folder.name}-source")
    collect(engine, ids, source, config, policy=engine.policy)
    make_validation(
        engine,
        list(read(source)),
        folder,
        load_reward(reward),
        decoder(engine.tokenizer),
        max_tokens=max_tokens,
        completions=completions,
        seed=2,
    )


# -------------------------------------------------------------------------------- training


def train(
    folder: Path,
    data: Path,
    labels: str,
    *,
    seed: int,
    kind: str = "value",
    base: str = "stories",
    model: dict[str, Any] | None = None,
    attention: str = "eager",
    patience: int | None = None,
    **config: Any,
) -> None:
    """Train a guide into ``folder``; a file beside it says how, and what validation found.

    A guide that is there is kept if it was trained in the same way, and else refused.

    Args:
        folder: of the guide.
        data: of the responses.
        labels: the series of rewards.
        seed: of weights and order.
        kind: ``value`` or ``fudge``.
        base: the backbone.
        model: options of ``ValueModel.create``; None trains all weights.
        attention: implementation; eager is the fastest to train on a CPU up to about 150 tokens.
        patience: stop after so many epochs that did not improve, and keep the best.
        config: of the trainer.
    """
    settings = {
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH,
        "ema": 0.99,
        **hardware(),
        "save_strategy": "epoch",
        "disable_tqdm": True,
        "logging_steps": 100,
        "seed": seed,
        **config,
    }
    callbacks = []
    if patience is not None:
        more, callbacks = early_stopping(kind, patience)
        settings |= more
    how = {"value": ValueConfig, "fudge": FudgeConfig}[kind](output_dir=str(folder), **settings)
    about = {"data": data.name, "labels": labels, "kind": kind, "base": Path(base).name}
    about |= {"model": model, "patience": patience, **settings}
    about |= {name: getattr(how, name) for name in ("gamma", "lam") if hasattr(how, name)}
    if metrics_file(folder).is_file():
        before = metrics_of(folder)["settings"]
        if different := sorted(n for n in {*about, *before} if about.get(n) != before.get(n)):
            name = different[0]
            raise ValueError(
                f"{folder} was trained with {name} {before.get(name)!r}, not {about.get(name)!r}; "
                "delete it, or choose another --work"
            )
        return
    started = time.perf_counter()
    metrics = train_guide(
        kind,
        data,
        base,
        how,
        labels=labels,
        attn_implementation=attention,
        callbacks=callbacks,
        **({"lora_rank": None} if model is None else model),
    )
    metrics["seconds"] = time.perf_counter() - started
    text = json.dumps({"settings": about, **metrics}, indent=1)
    metrics_file(folder).write_text(text + "\n", encoding="utf-8")


def hardware() -> dict[str, bool]:
    """A trainer's settings for this machine: a GPU if there is one, bf16 where that is faster.

    A CPU without bf16 instructions computes in it at a third of the speed of fp32.
    """
    gpu = torch.cuda.is_available()
    return {"bf16": gpu or torch.cpu._is_avx512_bf16_supported(), "use_cpu": not gpu}


def metrics_file(folder: Path) -> Path:
    """What is known of a guide's training: beside its folder, whose contents studies go by."""
    return folder.with_name(f"{folder.name}.json")


def metrics_of(folder: Path) -> dict[str, Any]:
    """Validation metrics of a guide, ``settings`` and ``seconds`` of its training."""
    found: dict[str, Any] = json.loads(metrics_file(folder).read_text(encoding="utf-8"))
    return found


def compared(guides: Mapping[str, Sequence[Path]], halves: Path) -> dict[str, dict[str, Any]]:
    """``validated`` of each guide, and by how much its error is more than the first one's.

    ``seconds`` is the mean time of its training.
    ``more`` is that difference, prefix by prefix and seed by seed, with the half-width of its 95 %
    interval: Student's over prefixes, widened by that over seeds.
    """
    found, errors = {}, {}
    for name, folders in guides.items():
        models = [ValueModel.from_pretrained(folder).eval() for folder in folders]
        found[name] = validated(models, halves)
        found[name]["seconds"] = statistics.fmean(metrics_of(f)["seconds"] for f in folders)
        errors[name] = [squared_errors(model, halves) for model in models]
    first, *others = errors
    for name in others:
        runs = [
            Estimate.of({i: [x - y] for i, (x, y) in enumerate(zip(ours, theirs, strict=True))})
            for ours, theirs in zip(errors[name], errors[first], strict=True)
        ]
        (more,) = pooled([[{"more": dataclasses.asdict(run)}] for run in runs])
        found[name]["more"] = {key: more["more"][key] for key in ("mean", "ci95")}
    return found


def validated(models: Sequence[ValueModel], halves: Path) -> dict[str, Any]:
    """Monte-Carlo errors of guides that differ in their seeds, in variances of the reward.

    ``mse`` and ``explained_variance`` are their means, with the mean bounds of the intervals over
    prefixes; ``seeds`` has the single errors.
    """
    found = [validate(model, halves) for model in models]

    def mean(name: str) -> dict[str, float]:
        intervals = [dataclasses.asdict(getattr(one, name)) for one in found]
        return {key: statistics.fmean(i[key] for i in intervals) for key in intervals[0]}

    return {
        "mse": mean("mse"),
        "explained_variance": mean("explained_variance"),
        "noise": statistics.fmean(one.noise for one in found),
        "seeds": [one.mse.mean for one in found],
        "prefixes": found[0].prefixes,
    }


# ------------------------------------------------------------------------------- measuring


def sampling(seed: int, max_tokens: int, n: int = 4) -> SamplingParams:
    """How responses are sampled."""
    return SamplingParams(temperature=TEMPERATURE, max_tokens=max_tokens, seed=seed, n=n)


def sample_points(study: Study, folder: Path, names: Sequence[str]) -> None:
    """The responses of some points of a study."""
    runner = Runner(study, folder)
    for point in study.points:
        if point.name in names:
            runner.responses(point)


def measure(studies: dict[Path, Study], processes: int) -> list[dict[str, Any]]:
    """Run studies that differ in their seeds, by folder; their results pooled."""
    jobs = [
        (_work(point), functools.partial(sample_points, study, folder, [point.name]))
        for folder, study in studies.items()
        for point in study.points
        if point.best_of == max(p.best_of for p in study.points if p.draws == point.draws)
    ]
    jobs.sort(key=lambda job: -job[0])
    parallel([job for _, job in jobs], processes)
    return pooled([Runner(study, folder).run() for folder, study in studies.items()])


def _work(point: Point) -> float:
    """Rows that a point scores, roughly."""
    return point.sampling.n * (1 + sum(1 for w in point.weights.values() if w) * point.rule.k)


def paired(
    studies: Mapping[Path, Study], pairs: Sequence[tuple[str, str]], kls: Sequence[float] = KLS
) -> dict[str, Any]:
    """Of methods two by two, what the first one's reward is above the other's at equal KL."""
    runners = [Runner(study, folder) for folder, study in studies.items()]
    methods = dict.fromkeys(method for pair in pairs for method in pair)
    points = {method: [runner.frontier(method) for runner in runners] for method in methods}
    return {
        f"{one} − {other}": differences(points[one], points[other], kls) for one, other in pairs
    }


def write(
    folder: Path, results: Sequence[dict[str, Any]], asked: argparse.Namespace, **more: Any
) -> None:
    """The record, from which ``python docs/refresh_readme.py --tables`` makes the page's tables."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {key: value for key, value in vars(asked).items() if isinstance(value, int)}
    setting = numbers | {"temperature": TEMPERATURE, "torch": torch.__version__}
    record = {"setting": setting, **more, "points": list(results)}
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(results))
