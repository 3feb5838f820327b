"""What a guided step costs by the way that the guide runs, beside an unguided one.

    python benchmarks/bench_ways.py [--batch 1 8] [--prompt 256] [--k 20] [--save NAME]

All cases share one policy (a Llama of 110 M parameters, random weights, bf16) and take turns step
by step. The floor of a case is the time that its passes cannot do without: for each pass the larger
of weights over read bandwidth and multiplications over matmul rate, both measured in this run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import record
import torch
from rich.console import Console
from rich.table import Table
from shapes import GUIDE_SEED, SHAPE, Shape, open_rows, prompt_tokens, random_head, random_llama

from fastguide import VAS, Plain, TreeScorer
from fastguide.engine.runner import ModelRunner
from fastguide.models.adapters import Factors
from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder

SMALL: Shape = SHAPE | dict(
    hidden_size=384, intermediate_size=1_024, num_hidden_layers=6, num_attention_heads=6
)
"""A guide of 23 M parameters, of which 11 M are multiplied with."""
SMALL["num_key_value_heads"] = 6
RANK = 16
BETA = 100.0
"""High, as the distribution of random weights is flat: candidates have nearly all of the mass."""


class Case(NamedTuple):
    """A way to decode: the runner, and the rows of each of its passes over some weights."""

    runner: ModelRunner
    guided: bool
    passes: Sequence[tuple[int, int]]
    """Weights, and rows of a request."""


def lora(decoder: Decoder, seed: int) -> int:
    """A random adapter of rank 16 on all linear layers; its number."""
    torch.manual_seed(seed)
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    sizes = dict.fromkeys([f"self_attn.{n}_proj" for n in "qkvo"], (width, width))
    sizes |= dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], (width, inner))
    sizes["mlp.down_proj"] = (inner, width)
    factors = {
        f"layers.{i}.{name}": Factors(0.02 * torch.randn(RANK, a), 0.02 * torch.randn(b, RANK))
        for i in range(SHAPE["num_hidden_layers"])
        for name, (a, b) in sizes.items()
    }
    number = decoder.add_adapter(factors)
    assert number is not None, "the policy's layers are not what the benchmark made them"
    return number


def build_cases(device: str, k: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Case]:
    """All cases around one policy."""
    policy, equal, small = (
        Decoder(model)
        for model in (
            random_llama(device, NAME, dtype),
            random_llama(device, NAME, dtype, seed=GUIDE_SEED).model,
            random_llama(device, NAME, dtype, SMALL).model,
        )
    )
    for decoder in (policy, equal, small):
        decoder.pack()
    adapters = [lora(policy, seed) for seed in range(3)]
    head, small_head = random_head(device, dtype), random_head(device, dtype, SMALL)
    on_policy = [TreeScorer(policy, head, adapter=number) for number in adapters]
    three = {f"value {i}" if i else "value": s for i, s in enumerate(on_policy)}

    def runner(way: str, **scorers: TreeScorer) -> ModelRunner:
        return ModelRunner(policy, scorers, way)

    head_weights = SHAPE["vocab_size"] * SHAPE["hidden_size"]
    body, last = policy.weights - head_weights, (head_weights, 1)
    return {
        "unguided": Case(runner("auto"), False, [(body, 1), last]),
        "two-phase, equal guide": Case(
            runner("auto", value=TreeScorer(equal, head)), True, [(body, 1), last, (body, k)]
        ),
        "two-phase, smaller guide": Case(
            runner("auto", value=TreeScorer(small, small_head)),
            True,
            [(body, 1), last, (small.weights, k)],
        ),
        "two-phase, LoRA": Case(
            runner("two-phase", value=on_policy[0]), True, [(body, 1), last, (body, k)]
        ),
        "one-pass, LoRA": Case(runner("one-pass", value=on_policy[0]), True, [(body, 2 * k), last]),
        "one-pass, three LoRAs": Case(runner("one-pass", **three), True, [(body, 4 * k), last]),
        "trunk": Case(runner("auto", value=TreeScorer(policy, head)), True, [(body, k), last]),
    }


def measure(
    cases: dict[str, Case], arguments: argparse.Namespace, batch: int, roof: dict[str, float]
) -> dict[str, Any]:
    """Steps of all cases in turns: medians, ratios to the unguided step beside them, floors."""
    prompts = [prompt_tokens(b, arguments.prompt) for b in range(batch)]
    rows = {}
    for name, case in cases.items():
        rule = VAS(beta=BETA, k=arguments.k) if case.guided else Plain()
        weights = dict.fromkeys(case.runner.scorers, 1.0) if case.guided else None
        rows[name] = open_rows(case.runner, rule, prompts, 0.7, weights)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(arguments.steps + 4):
        for name, case in cases.items():
            start = time.perf_counter()
            case.runner.step(rows[name])
            if i >= 4:  # the first steps warm up
                times[name].append(time.perf_counter() - start)
    for opened in rows.values():
        for row in opened:
            row.close()
    found: dict[str, Any] = {"batch": batch, "cases": {}}
    for name, case in cases.items():
        seconds = times[name]
        ratios = [a / b for a, b in zip(seconds, times["unguided"], strict=True)]
        bound = sum(floor(w, batch * n, roof) for w, n in case.passes)
        found["cases"][name] = record.spread(seconds) | {
            "over_unguided": round(statistics.median(ratios), 2),
            "floor_ms": round(1e3 * bound, 2),
            "of_floor": round(bound / statistics.median(seconds), 2),
            "tokens_per_s": round(batch / statistics.median(seconds), 1),
        }
    return found


def floor(weights: int, rows: int, roof: dict[str, float], size: int = 2) -> float:
    """Seconds that a pass of ``rows`` rows takes at least, with weights of ``size`` bytes."""
    reading = weights * size / (1e9 * roof["read_GB_per_s"])
    multiplying = 2 * weights * rows / (1e9 * roof["matmul_GFLOP_per_s"])
    return max(reading, multiplying)


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
    cases = build_cases(arguments.device, arguments.k)
    roof = record.rooflines(torch.bfloat16, arguments.device)
    results = [measure(cases, arguments, batch, roof) for batch in arguments.batch]
    table = Table("batch", "case", "ms/step (p20-p80)", "/ unguided", "of its floor")
    for result in results:
        for name, r in result["cases"].items():
            times = f"{r['ms']:.1f} ({r['p20_ms']:.1f}-{r['p80_ms']:.1f})"
            ratio, share = f"{r['over_unguided']:.2f}", f"{r['of_floor']:.0%}"
            table.add_row(str(result["batch"]), name, times, ratio, share)
    Console().print(table)
    if arguments.save:
        whole = {
            "benchmark": "ways",
            "environment": record.environment(arguments.device),
            "rooflines": roof,
            "shape": SHAPE | {"dtype": "bfloat16", "prompt": arguments.prompt, "k": arguments.k},
            "rank": RANK,
            "results": results,
        }
        print(f"record: {record.save(arguments.save, whole)}")


if __name__ == "__main__":
    main()
