"""A training step of a guide beside one of a plain ``transformers.Trainer`` fine-tune.

    python benchmarks/bench_train.py [--case stories-lora] [--rounds 5] [--save NAME]

Both train the same backbone with the same adapters on batches of rows of the same length, in
bf16 mixed precision with AdamW: fastguide by TD(lambda) with an average of the weights, the plain
trainer as a language model, and once more as a token classifier with one label, which spares it
the vocabulary. They alternate in rounds, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from shapes import SHAPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastguide.assets import resolve
from fastguide.models.guide_config import GuideConfig, RewardScale
from fastguide.models.value import ValueModel
from fastguide.train.episodes import Episode
from fastguide.train.value import ValueConfig, ValueTrainer

RANK = 16
CASES: dict[str, dict[str, Any]] = {
    "stories-lora": {"base": "stories", "rank": RANK, "batch": 32, "length": 160},
    "stories-full": {"base": "stories", "rank": None, "batch": 32, "length": 160},
    "llama-110m-lora": {"base": "llama", "rank": RANK, "batch": 4, "length": 128},
}


class Clock(TrainerCallback):
    """The seconds from the end of one optimizer step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        """Without the first, which warms up."""
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


def settings(folder: Path, case: dict[str, Any], steps: int) -> dict[str, Any]:
    """What all trainers are told."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": case["batch"],
        "max_steps": steps + 1,
        "learning_rate": 1e-3,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def episodes(case: dict[str, Any], vocabulary: int, steps: int) -> list[Episode]:
    """Rows of one length: sorting by length, which ``ValueTrainer`` does, is not its gain here."""
    rng = random.Random(0)
    found = []
    for _ in range(case["batch"] * (steps + 1)):
        ids = tuple(rng.randrange(1, vocabulary) for _ in range(case["length"]))
        found.append(Episode(ids[:16], ids[16:], rng.gauss(0.0, 1.0)))
    return found


def value_steps(base: str, case: dict[str, Any], rows: list[Episode], steps: int) -> list[float]:
    """Seconds of fastguide's steps."""
    config = GuideConfig(base, RewardScale("reward", 0.0, 1.0))
    model = ValueModel.create(
        base, config=config, lora_rank=case["rank"], attn_implementation=case["attention"]
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        how = ValueConfig(**settings(Path(folder), case, steps), ema=0.99)
        ValueTrainer(model, how, rows, callbacks=[clock]).train()
    return clock.steps


def plain_steps(
    auto_class: Any, base: str, case: dict[str, Any], rows: list[Episode], steps: int
) -> list[float]:
    """Seconds of a plain trainer's steps."""
    options = {"num_labels": 1} if auto_class is AutoModelForTokenClassification else {}
    model = auto_class.from_pretrained(
        base, dtype=torch.float32, attn_implementation=case["attention"], **options
    )
    if case["rank"] is not None:
        heads = {"modules_to_save": ["score"]} if options else {}
        model = get_peft_model(
            model,
            LoraConfig(
                r=case["rank"],
                lora_alpha=case["rank"],
                target_modules="all-linear",
                exclude_modules=["score"] if options else None,
                **heads,
            ),
        )

    def collate(batch: list[Episode]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([e.prompt_ids + e.response_ids for e in batch])
        rewards = torch.tensor([e.reward for e in batch])
        labels = rewards[:, None].expand(ids.shape) if options else ids
        return {"input_ids": ids, "labels": labels.contiguous()}

    class Regression(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            labels = inputs.pop("labels")
            return ((model(**inputs).logits[..., 0] - labels) ** 2).mean()

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = (Regression if options else Trainer)(
            model=model,
            args=TrainingArguments(
                **settings(Path(folder), case, steps),
                remove_unused_columns=False,
            ),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.train()
    return clock.steps


def make_llama(folder: Path) -> str:
    """The engine benchmark's model with random weights, as a folder."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All trainers, round by round."""
    case = CASES[name] | {"attention": arguments.attention}
    base = make_llama(folder) if case["base"] == "llama" else resolve(case["base"])
    vocabulary = SHAPE["vocab_size"] if case["base"] == "llama" else 2048
    rows = episodes(case, vocabulary, arguments.steps)
    trainers: dict[str, Callable[[], list[float]]] = {
        "fastguide": lambda: value_steps(base, case, rows, arguments.steps),
        "language model": lambda: plain_steps(
            AutoModelForCausalLM, base, case, rows, arguments.steps
        ),
        "token classifier": lambda: plain_steps(
            AutoModelForTokenClassification, base, case, rows, arguments.steps
        ),
    }
    times: dict[str, list[list[float]]] = {trainer: [] for trainer in trainers}
    for _ in range(arguments.rounds):
        for trainer, run in trainers.items():
            times[trainer].append(run())
    result: dict[str, Any] = {"case": name, **case}
    for trainer, rounds in times.items():
        result[trainer] = record.spread([step for one in rounds for step in one])
    for other in list(trainers)[1:]:
        ratios = [
            statistics.median(ours) / statistics.median(theirs)
            for ours, theirs in zip(times["fastguide"], times[other], strict=True)
        ]
        result[f"over {other}"] = {
            "median": round(statistics.median(ratios), 3),
            "rounds": [round(ratio, 3) for ratio in ratios],
        }
    return result


def show(results: list[dict[str, Any]]) -> None:
    """One line per case."""
    table = Table("case", "fastguide, ms", "language model, ms", "token classifier, ms", "ratios")
    for r in results:
        names = ("fastguide", "language model", "token classifier")
        times = [f"{r[n]['ms']:.0f} ({r[n]['p20_ms']:.0f}-{r[n]['p80_ms']:.0f})" for n in names]
        ratios = [f"{r[f'over {n}']['median']:.2f}" for n in names[1:]]
        table.add_row(r["case"], *times, ", ".join(ratios))
    Console().print(table)


def main() -> None:
    """Run the benchmark and, with --save, keep its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="sdpa")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(name, arguments, Path(folder) / name) for name in arguments.case]
    show(results)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = {
        "benchmark": "train",
        "environment": record.environment(device),
        "steps": arguments.steps,
        "results": results,
    }
    if arguments.save:
        print(f"record: {record.save(arguments.save, whole)}")


if __name__ == "__main__":
    main()
