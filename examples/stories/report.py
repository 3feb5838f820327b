"""Measure the packaged guides on held-out prompts and print the table that the cards quote.

    python examples/stories/report.py

Points already in ``docs/results/stories.json`` for the same weights are kept; the others are
measured and written as soon as they are done, so that a killed run continues.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from cards import COLUMNS, table, write_guide_cards
from prompts import heldout_prompts, read_stories

import fastguide
from fastguide import VAS, Engine, SamplingParams, ValueGuide
from fastguide.models.guide_config import GuideConfig
from fastguide.request import Completion, sample_seed
from fastguide.rewards import Sample, load_reward

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs/results/stories.json"
TABLE = ROOT / "docs/results/stories.md"
TEMPERATURE = 0.7
CANDIDATES = 20
SAMPLES = 4
BETAS = {
    "cheerful": (0.0, 1.0, 2.0, 4.0, 8.0, -1.0, -2.0, -4.0, -8.0),
    "brief": (0.0, 1.0, 2.0, 4.0, 8.0, -1.0, -2.0),
}
MAX_TOKENS = {"cheerful": 128, "brief": 320}
INTRODUCTION = f"""# The packaged guides on held-out prompts

Made by `python examples/stories/report.py` from `stories.json`. Prompts: first sentences of 64
validation stories, {SAMPLES} responses each, VAS with k = {CANDIDATES}, temperature {TEMPERATURE},
up to {MAX_TOKENS["cheerful"]} tokens for cheerful and {MAX_TOKENS["brief"]} for brief. ± is a
95 % interval. {COLUMNS}
"""


def run(data: Path, assets: Path, threads: int) -> None:
    """Measure every missing point, then print and write the tables."""
    torch.set_num_threads(threads)
    record = _open_record(assets)
    prompts = heldout_prompts(read_stories(data / "valid.txt"))
    for name, betas in BETAS.items():
        missing = [b for b in betas if f"{b:g}" not in record["points"].setdefault(name, {})]
        if not missing:
            continue
        engine = Engine(assets / "stories", {name: ValueGuide(assets / name)}, max_rows=128)
        for beta in missing:
            record["points"][name][f"{beta:g}"] = measure(engine, name, beta, prompts, assets)
            _save(record)
            print(f"{name} at beta {beta:g}: done", flush=True)
    sections = [f"## {name}\n\n{table(record, name)}" for name in BETAS]
    TABLE.write_text("\n".join([INTRODUCTION, *sections]), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))


def measure(
    engine: Engine, name: str, beta: float, prompts: list[str], assets: Path
) -> dict[str, Any]:
    """One point: ``SAMPLES`` responses to every prompt at one beta, judged without the prompt."""
    sampling = [
        SamplingParams(
            temperature=TEMPERATURE,
            max_tokens=MAX_TOKENS[name],
            n=SAMPLES,
            seed=sample_seed(2024, i + 1),
        )
        for i in range(len(prompts))
    ]
    rule = VAS(beta=beta, k=CANDIDATES)
    outputs = engine.generate(prompts, rule, {name: 1.0}, sampling, progress=False)
    scale = GuideConfig.load(assets / name).reward
    samples = [Sample(prompts[o.prompt], o.text, len(o.token_ids)) for o in outputs]
    raw = load_reward(scale.name)(samples)
    return {
        "samples": len(outputs),
        "reward": _estimate(raw),
        "reward_sd_units": _estimate(scale.standardise(raw)),
        "tokens": _estimate([float(len(o.token_ids)) for o in outputs]),
        "kl_per_response": _estimate([sum(o.kl) for o in outputs]),
        "stopped": sum(o.finish_reason == "stop" for o in outputs) / len(outputs),
        "repeated_4grams": statistics.fmean(map(_repetition, outputs)),
        "example": outputs[0].text,
    }


def _estimate(values: list[float]) -> dict[str, float]:
    """Mean and the half-width of its 95 % interval."""
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "ci95": half}


def _repetition(output: Completion) -> float:
    """Share of a response's token 4-grams that occurred before in it: 0 is no repetition."""
    grams = list(zip(*(output.token_ids[i:] for i in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _open_record(assets: Path) -> dict[str, Any]:
    """The record on disk without the points of guides whose weights have changed."""
    weights = {}
    for name in ("stories", *BETAS):
        files = sorted((assets / name).glob("*.safetensors"))
        weights[name] = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
    setting = {
        "temperature": TEMPERATURE,
        "k": CANDIDATES,
        "max_tokens": MAX_TOKENS,
        "prompts": 64,
        "samples_per_prompt": SAMPLES,
    }
    record: dict[str, Any] = {}
    if RECORD.is_file():
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    old = record.get("weights", {})
    same = record.get("setting") == setting and old.get("stories") == weights["stories"]
    points = record.get("points", {}) if same else {}
    return {
        "setting": setting,
        "weights": weights,
        "points": {n: p for n, p in points.items() if old.get(n) == weights.get(n)},
    }


def _save(record: dict[str, Any]) -> None:
    record["made"] = {
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {torch.get_num_threads()} threads ({platform.machine()})",
        "fastguide": fastguide.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    part = RECORD.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, RECORD)


def main() -> None:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(description="measure the packaged guides")
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared/data/stories", help="has valid.txt")
    add("--assets", type=Path, default=ROOT / "fastguide/assets", help="folder of the models")
    add("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    if not (options.data / "valid.txt").is_file():
        parser.error(f"missing: {options.data / 'valid.txt'} (see --data)")
    run(options.data, options.assets, options.threads)
    write_guide_cards(options.assets)


if __name__ == "__main__":
    main()
