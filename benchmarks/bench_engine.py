"""Tokens per second, guided and unguided, and where a step's time goes.

    python benchmarks/bench_engine.py [--batch 1 8] [--prompt 256] [--k 20] [--save NAME]

The model is a Llama of 110 M parameters with random weights (12 layers, width 768, vocabulary
32,000, bf16), the guide another of the same shape. Guided and unguided steps alternate in one
run, so that a noisy machine disturbs both alike; ``transformers.generate`` is timed beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from fastguide import VAS, Plain, TreeScorer
from fastguide.config import Rule
from fastguide.engine.runner import ModelRunner, Row, RowSpec
from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder

SHAPE = dict(
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2_048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    max_position_embeddings=4_096,
)


def random_llama(device: str, attention: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The benchmark's model, the same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(device=device, dtype=dtype).eval()


def build(device: str, dtype: torch.dtype = torch.bfloat16) -> ModelRunner:
    """Policy and guide, each with its own weights and pool."""
    guide = random_llama(device, NAME, dtype)
    torch.manual_seed(1)
    head = torch.nn.Linear(SHAPE["hidden_size"], 1, device=device, dtype=dtype)
    scorer = TreeScorer(Decoder(guide.model), head)
    return ModelRunner(Decoder(random_llama(device, NAME, dtype)), {"value": scorer})


def prompt_tokens(row: int, length: int) -> list[int]:
    """A prompt of its own for each row."""
    return [(31 * i + 7 * row) % SHAPE["vocab_size"] for i in range(length)]


def open_rows(
    runner: ModelRunner, rule: Rule, batch: int, prompt: int, temperature: float = 0.7
) -> list[Row]:
    """``batch`` requests with prompts of their own."""
    weights = {"value": 1.0} if rule.guided else {}
    parameters = rule.lower(temperature)
    specs = [RowSpec(prompt_tokens(b, prompt), parameters, weights, b) for b in range(batch)]
    rows = runner.open(specs)
    runner.prefill(rows, [prompt] * batch)
    return rows


@torch.inference_mode()
def check(device: str, prompt: int = 32, steps: int = 4) -> None:
    """Greedy tokens, plain and guided, must be those of a full recompute in fp32."""
    runner = build(device, torch.float32)
    policy, guide = (random_llama(device, "sdpa", torch.float32) for _ in range(2))
    head = runner.scorers["value"].head  # type: ignore[attr-defined]
    for rule in (Plain(), VAS(beta=20.0, k=5)):
        rows = open_rows(runner, rule, 1, prompt, temperature=0.0)
        found = [runner.step(rows)[0].tokens[0] for _ in range(steps)]
        tokens = prompt_tokens(0, prompt)
        for _ in range(steps):
            logits = policy(torch.tensor([tokens], device=device)).logits[0, -1]
            values, ids = logits.topk(rule.k)
            if rule.guided:
                texts = torch.tensor([[*tokens, t] for t in ids.tolist()], device=device)
                hidden = guide.model(texts).last_hidden_state[:, -1]
                values = values + rule.beta * head(hidden)[:, 0]
            tokens.append(int(ids[values.argmax()]))
        expected = tokens[prompt:]
        if found != expected:
            raise SystemExit(f"{rule}: tokens {found}, but a full recompute gives {expected}")


def time_transformers(device: str, batch: int, prompt: int, steps: int) -> float:
    """Seconds per token step of ``transformers.generate``, unguided, without its prefill."""
    model = random_llama(device, "sdpa")
    ids = torch.randint(0, SHAPE["vocab_size"], (batch, prompt), device=device)

    def run(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=count
            )
        return time.perf_counter() - start

    run(2)
    return statistics.median((run(steps + 1) - run(1)) / steps for _ in range(3))


def measure(runner: ModelRunner, arguments: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Alternate unguided and guided steps; medians, spreads and phases of both."""
    rules = {"unguided": Plain(), "guided": VAS(beta=4.0, k=arguments.k)}
    rows = {n: open_rows(runner, rule, batch, arguments.prompt) for n, rule in rules.items()}
    times: dict[str, list[float]] = {name: [] for name in rules}
    phases = {name: dict.fromkeys(runner.seconds, 0.0) for name in rules}
    for i in range(arguments.steps + 4):
        for name in rules:
            before = dict(runner.seconds)
            start = time.perf_counter()
            runner.step(rows[name])
            if i >= 4:  # the first steps warm up
                times[name].append(time.perf_counter() - start)
                for phase, seconds in runner.seconds.items():
                    phases[name][phase] += seconds - before[phase]
    pool = runner.scorers["value"].decoder.pool  # type: ignore[attr-defined]
    result: dict[str, Any] = {"batch": batch}
    for name in rules:
        total = sum(times[name])
        result[name] = record.spread(times[name]) | {
            "tokens_per_s": round(batch / statistics.median(times[name]), 1),
            "share": {p: round(s / total, 3) for p, s in phases[name].items()},
        }
        if arguments.device != "cpu":  # the host runs ahead of the device: its clock is no guide
            result[name]["share"] = {}
        for row in rows[name]:
            row.close()
    # Each guided step is compared with the unguided one beside it.
    ratios = [g / u for g, u in zip(times["guided"], times["unguided"], strict=True)]
    result["guided_over_unguided"] = round(statistics.median(ratios), 2)
    result["guide_pool_slots"] = pool.slots.capacity
    per_token = time_transformers(arguments.device, batch, arguments.prompt, arguments.steps)
    result["transformers_unguided_ms"] = round(1e3 * per_token, 3)
    return result


def show(results: list[dict[str, Any]]) -> None:
    """Print one line per batch and mode."""
    table = Table("batch", "mode", "ms/step (p20-p80)", "tokens/s", "base", "scorer", "rule")
    for result in results:
        for mode in ("unguided", "guided"):
            r = result[mode]
            times = f"{r['ms']:.1f} ({r['p20_ms']:.1f}-{r['p80_ms']:.1f})"
            phases = ("base", "scorer", "rule")
            shares = [f"{r['share'][p]:.0%}" if r["share"] else "" for p in phases]
            table.add_row(str(result["batch"]), mode, times, f"{r['tokens_per_s']:.1f}", *shares)
        other = result["transformers_unguided_ms"]
        rate = f"{1e3 * result['batch'] / other:.1f}"
        table.add_row(str(result["batch"]), "transformers", f"{other:.1f}", rate, "", "", "")
    console = Console()
    console.print(table)
    for result in results:
        ratio = result["guided_over_unguided"]
        console.print(f"batch {result['batch']}: a guided step takes {ratio:.2f} unguided steps")


def main() -> None:
    """Run the benchmark and, with --save, keep its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    check(arguments.device)
    runner = build(arguments.device)
    results = [measure(runner, arguments, batch) for batch in arguments.batch]
    show(results)
    whole = {
        "benchmark": "engine",
        "environment": record.environment(arguments.device),
        "rooflines": record.rooflines(torch.bfloat16, arguments.device),
        "shape": SHAPE | {"dtype": "bfloat16", "prompt": arguments.prompt, "k": arguments.k},
        "results": results,
    }
    if arguments.save:
        print(f"record: {record.save(arguments.save, whole)}")


if __name__ == "__main__":
    main()
