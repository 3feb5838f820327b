"""What a guided step costs by the way that the guide runs, beside an unguided one.

    python benchmarks/bench_ways.py [--batch 1 8] [--prompt 256] [--k 20] [--save NAME]
    python benchmarks/bench_ways.py --model 7B --prompt 512 --graphs --compile    # on a GPU

All cases share one policy (a Llama of 110 M parameters or of ``--model``'s, random weights, bf16)
and take turns step by step. The floor of a case is the time that its passes cannot do without: for
each pass the larger of weights over read bandwidth and multiplications over matmul rate, both
measured in this run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import record
import torch
from energy import joules
from rich.console import Console
from rich.table import Table
from shapes import (
    GUIDE_SEED,
    PAIRS,
    SHAPE,
    Shape,
    open_rows,
    prompt_tokens,
    random_head,
    random_llama,
)
from turns import WARM_UP, ratio, take_turns

from fastguide import VAS, Plain, TreeScorer
from fastguide.engine.program import BLOCK
from fastguide.engine.runner import ModelRunner
from fastguide.models.adapters import Factors
from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder

RANK = 16
BETA = 100.0
"""High, as the distribution of random weights is flat: candidates have nearly all of the mass."""


class Case(NamedTuple):
    """A way to decode: the runner, and the rows of each of its passes over some weights."""

    runner: ModelRunner
    guided: bool
    passes: Sequence[tuple[int, int, int]]
    """Weights, and rows of a request: so many, and so many for each candidate."""


def lora(decoder: Decoder, seed: int, shape: Shape = SHAPE) -> int:
    """A random adapter of rank 16 on all linear layers; its number."""
    torch.manual_seed(seed)
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    sizes = dict.fromkeys([f"self_attn.{n}_proj" for n in "qkvo"], (width, width))
    sizes |= dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], (width, inner))
    sizes["mlp.down_proj"] = (inner, width)
    factors = {
        f"layers.{i}.{name}": Factors(0.02 * torch.randn(RANK, a), 0.02 * torch.randn(b, RANK))
        for i in range(shape["num_hidden_layers"])
        for name, (a, b) in sizes.items()
    }
    number = decoder.add_adapter(factors)
    assert number is not None, "the policy's layers are not what the benchmark made them"
    return number


def build_cases(
    device: str,
    shapes: tuple[Shape, Shape] = PAIRS["110M"],
    *,
    fixed: bool = False,
    compiled: bool = False,
) -> dict[str, Case]:
    """All cases around one policy, in bf16.

    Args:
        device: of all models.
        shapes: of the policy and of the smaller guide.
        fixed: make steps of fixed shapes; ``reserve`` comes before the first one.
        compiled: fuse what is small in the layers.
    """
    shape, smaller = shapes
    dtype = torch.bfloat16
    policy, equal, small = (
        Decoder(model)
        for model in (
            random_llama(device, NAME, dtype, shape),
            random_llama(device, NAME, dtype, shape, seed=GUIDE_SEED).model,
            random_llama(device, NAME, dtype, smaller).model,
        )
    )
    for decoder in (policy, equal, small):
        decoder.pack()
    adapters = [lora(policy, seed, shape) for seed in range(3)]
    head, small_head = random_head(device, dtype, shape), random_head(device, dtype, smaller)
    on_policy = [TreeScorer(policy, head, adapter=number) for number in adapters]
    three = {f"value {i}" if i else "value": s for i, s in enumerate(on_policy)}
    if compiled:
        for decoder in (policy, equal, small):
            decoder.fuse()

    def runner(way: str, **scorers: TreeScorer) -> ModelRunner:
        return ModelRunner(policy, scorers, way, fixed=fixed)

    head_weights = shape["vocab_size"] * shape["hidden_size"]
    body, last = policy.weights - head_weights, (head_weights, 1, 0)
    return {
        "unguided": Case(runner("auto"), False, [(body, 1, 0), last]),
        "two-phase, equal guide": Case(
            runner("auto", value=TreeScorer(equal, head)), True, [(body, 1, 0), last, (body, 0, 1)]
        ),
        "two-phase, smaller guide": Case(
            runner("auto", value=TreeScorer(small, small_head)),
            True,
            [(body, 1, 0), last, (small.weights, 0, 1)],
        ),
        "two-phase, LoRA": Case(
            runner("two-phase", value=on_policy[0]), True, [(body, 1, 0), last, (body, 0, 1)]
        ),
        "one-pass, LoRA": Case(runner("one-pass", value=on_policy[0]), True, [(body, 0, 2), last]),
        "one-pass, three LoRAs": Case(runner("one-pass", **three), True, [(body, 0, 4), last]),
        "trunk": Case(runner("auto", value=TreeScorer(policy, head)), True, [(body, 0, 1), last]),
    }


def build_guide(
    policy: Decoder, shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[int, Case]:
    """A guide of another shape beside a policy: its parameters, and the case."""
    model = random_llama(device, NAME, dtype, shape, seed=GUIDE_SEED).model
    parameters = sum(p.numel() for p in model.parameters())
    decoder = Decoder(model)
    decoder.pack()
    head_weights = SHAPE["vocab_size"] * SHAPE["hidden_size"]
    body = policy.weights - head_weights
    passes = [(body, 1, 0), (head_weights, 1, 0), (decoder.weights, 0, 1)]
    scorer = TreeScorer(decoder, random_head(device, dtype, shape))
    return parameters, Case(ModelRunner(policy, {"value": scorer}), True, passes)


def measure(
    cases: Mapping[str, Case],
    asked: argparse.Namespace,
    roof: dict[str, float],
    *,
    batch: int = 1,
    k: int | None = None,
    prompt: int | None = None,
    shape: Shape = SHAPE,
) -> dict[str, dict[str, Any]]:
    """Steps of all cases in turns: medians, ratios to the unguided step beside them, floors."""
    k, prompt = k or asked.k, prompt or asked.prompt
    prompts = [prompt_tokens(b, prompt, shape) for b in range(batch)]
    rows, steps = {}, {}
    for name, case in cases.items():
        rule = VAS(beta=BETA, k=k) if case.guided else Plain()
        weights = dict.fromkeys(case.runner.scorers, 1.0) if case.guided else None
        rows[name] = open_rows(case.runner, rule, prompts, 0.7, weights)
        steps[name] = functools.partial(case.runner.step, rows[name])
    times = take_turns(steps, asked.steps, asked.device)
    spent = {name: joules(step, asked.steps, asked.device) for name, step in steps.items()}
    for opened in rows.values():
        for row in opened:
            row.close()
    found = {}
    for name, case in cases.items():
        median = statistics.median(times[name])
        bound = sum(floor(w, batch * (n + k * each), roof) for w, n, each in case.passes)
        found[name] = record.spread(times[name]) | {
            "over_unguided": round(ratio(times, name, "unguided"), 2),
            "floor_ms": round(1e3 * bound, 2),
            "of_floor": round(bound / median, 2),
            "tokens_per_s": round(batch / median, 1),
            "joules": spent[name],
        }
    return found


def reserve(cases: Mapping[str, Case], rows: int, tokens: int) -> None:
    """Give all pools their size: for ``rows`` rows of every case at once, of ``tokens`` tokens."""
    sequences: Counter[Decoder] = Counter()
    for case in cases.values():
        sequences[case.runner.policy] += 1
        sequences.update(s.decoder for s in case.runner.scorers.values())  # type: ignore[attr-defined]
    for decoder, count in sequences.items():
        decoder.reserve(count * rows * tokens, prefixes=False)


def floor(weights: int, rows: int, roof: dict[str, float], size: int = 2) -> float:
    """Seconds that a pass of ``rows`` rows takes at least, with weights of ``size`` bytes."""
    reading = weights * size / (1e9 * roof["read_GB_per_s"])
    multiplying = 2 * weights * rows / (1e9 * roof["matmul_GFLOP_per_s"])
    return max(reading, multiplying)


def main() -> None:
    """Run the benchmark and, with --save, keep its record."""
    parser = record.parser(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--model", choices=PAIRS, default="110M")
    parser.add_argument("--case", nargs="+", default=[""], help="only those with this in the name")
    parser.add_argument("--graphs", action="store_true", help="steps of fixed shapes")
    parser.add_argument("--compile", action="store_true", help="fuse what is small in the layers")
    arguments = parser.parse_args()
    shapes = PAIRS[arguments.model]
    options = {"fixed": arguments.graphs, "compiled": arguments.compile}
    cases = build_cases(arguments.device, shapes, **options)
    chosen = ["unguided", *(n for n in cases if any(part in n for part in arguments.case))]
    cases = {name: cases[name] for name in dict.fromkeys(chosen)}
    if arguments.graphs:
        # Steps are timed, and made again to read joules.
        tokens = arguments.prompt + 2 * arguments.steps + WARM_UP + BLOCK + arguments.k + 3
        reserve(cases, max(arguments.batch), tokens)
    roof = record.rooflines(torch.bfloat16, arguments.device)
    results = [
        {"batch": batch, "cases": measure(cases, arguments, roof, batch=batch, shape=shapes[0])}
        for batch in arguments.batch
    ]
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
            "shape": shapes[0]
            | {"dtype": "bfloat16", "prompt": arguments.prompt, "k": arguments.k},
            "rank": RANK,
            "graphs": arguments.graphs,
            "compile": arguments.compile,
            "results": results,
        }
        print(f"record: {record.save(arguments.save, whole)}")


if __name__ == "__main__":
    main()
