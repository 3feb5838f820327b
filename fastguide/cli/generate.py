"""``fastguide generate``: complete prompts, guided or not."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fastguide import assets
from fastguide.cli import options
from fastguide.cli.arguments import (
    build_rule,
    parse_guides,
    parse_memory,
    read_prompts,
    unescape,
)
from fastguide.cli.loading import load_engine
from fastguide.cli.output import Printer, opened
from fastguide.config import Rule
from fastguide.prompts import as_chat
from fastguide.request import GenerationError, SamplingParams

if TYPE_CHECKING:
    from fastguide.engine import Engine
    from fastguide.engine.text import Prompt
    from fastguide.search import BestOfN


@dataclass(frozen=True)
class Job:
    """What to generate, checked as far as it can be without a model."""

    prompts: Sequence[str]
    rule: Rule
    weights: Mapping[str, float] | None
    sampling: SamplingParams
    search: BestOfN | None = None
    chat: bool = False

    @property
    def asked(self) -> list[Prompt]:
        """What the engine is given."""
        return [as_chat(text) if self.chat else text for text in self.prompts]


def generate(
    prompts: options.Prompts = None,
    source: options.Input = None,
    chat: options.Chat = False,
    model: options.Model = None,
    guides: options.Guides = None,
    guide_base: options.GuideBase = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    rule: options.RuleName = None,
    beta: options.Beta = None,
    weight: options.Weight = None,
    k: options.K = None,
    candidate_mass: options.CandidateMass = None,
    fill: options.Fill = None,
    form: options.Form = None,
    temperature: options.Temperature = 0.7,
    max_tokens: options.MaxTokens = 128,
    stop: options.Stop = None,
    samples: options.Samples = 1,
    best_of: options.BestOf = None,
    rewards: options.SearchRewards = None,
    seed: options.Seed = None,
    max_rows: options.MaxRows = 64,
    kv_memory: options.KvMemory = None,
    way: options.Way = "auto",
    tensor_parallel: options.TensorParallel = False,
    graphs: options.Graphs = False,
    compile: options.Compile = False,
    stream: options.Stream = False,
    as_json: options.AsJson = False,
    output: options.Output = None,
) -> None:
    """Continue texts with a language model that guides steer."""
    if stream and as_json:
        raise ValueError("--stream and --json are both given; allowed is one of them")
    search = _search_of(best_of, rewards, samples, stream, device, trust_remote_code)
    strength = (beta, weight, k, candidate_mass, fill, form)
    asked = rule in ("vas", "args", "fudge") or any(value is not None for value in strength)
    default = assets.guides() if asked and rule != "none" and model is None else []
    given = parse_guides(guides or default)
    chosen = build_rule(
        rule,
        bool(given),
        beta=beta,
        weight=weight,
        k=k,
        candidate_mass=candidate_mass,
        fill=fill,
        form=form,
    )
    if guide_base is not None and all(guide.path in assets.names() for guide in given):
        raise ValueError("--guide-base is given, but no guide is; allowed with --guide NAME=PATH")
    memory = parse_memory(kv_memory)
    job = Job(
        prompts=read_prompts(prompts or [], source),
        rule=chosen,
        weights={guide.name: guide.weight for guide in given} or None,
        sampling=SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            stop=[unescape(text) for text in stop or []],
            seed=seed,
            n=samples,
        ),
        search=search,
        chat=chat,
    )
    with opened(output) as file:
        printer = Printer(file, job.prompts, samples, as_json)
        engine = load_engine(
            model,
            given,
            guide_base=guide_base,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            max_rows=max_rows,
            kv_memory=memory,
            way=way,
            tensor_parallel=tensor_parallel,
            graphs=graphs,
            compile=compile,
        )
        if output is not None and Path(output).is_file():
            file.truncate(0)
        try:
            if search is not None:
                _search(engine, job, search, printer)
            else:
                (_stream if stream else _complete)(engine, job, printer)
        except KeyboardInterrupt:
            printer.report_interrupt()
            raise
    if printer.failed:
        raise typer.Exit(2)


def _search_of(
    n: int | None,
    rewards: Sequence[str] | None,
    samples: int,
    stream: bool,
    device: str | None,
    trust_remote_code: bool,
) -> BestOfN | None:
    if n is None or not rewards:
        if n is None and rewards:
            raise ValueError("--reward is given; allowed with --best-of N")
        if n is not None:
            raise ValueError("--best-of needs a judge; for example --reward cheerfulness")
        return None
    if stream or samples != 1:
        other = "--stream" if stream else "--n"
        raise ValueError(f"--best-of and {other} are both given; allowed is one of them")
    from fastguide.rewards import load_reward
    from fastguide.search import BestOfN

    judge = load_reward(rewards, device=device, trust_remote_code=trust_remote_code)
    return BestOfN(judge, n)


def _search(engine: Engine, job: Job, search: BestOfN, printer: Printer) -> None:
    from fastguide.engine.progress import progress
    from fastguide.search import best_of_n

    choices = best_of_n(
        engine,
        job.prompts,
        search,
        rule=job.rule,
        weights=job.weights,
        sampling=job.sampling,
        asked=job.asked,
    )
    total = len(job.prompts)
    try:
        with progress(total, wanted=total > 1 and not printer.on_terminal) as note:
            for choice in choices:
                printer.choose(choice)
                note(printer.finished)
    except KeyboardInterrupt:
        printer.flush()
        raise


def _complete(engine: Engine, job: Job, printer: Printer) -> None:
    from fastguide.engine.progress import progress

    completions = engine.completions(job.asked, job.rule, job.weights, job.sampling)
    total = len(job.prompts) * job.sampling.n
    try:
        with progress(total, wanted=total > 1 and not printer.on_terminal) as note:
            for completion in completions:
                printer.add(completion)
                note(printer.finished)
    except KeyboardInterrupt as interrupt:
        # Where it came while one was printed, the engine has yet to hear of it.
        with contextlib.suppress(KeyboardInterrupt):
            printer.add(completions.throw(interrupt))
            for completion in completions:
                printer.add(completion)
        printer.flush()
        raise


def _stream(engine: Engine, job: Job, printer: Printer) -> None:
    for i, prompt in enumerate(job.asked):
        try:
            printer.stream(i, engine.stream(prompt, job.rule, job.weights, job.sampling))
        except GenerationError as error:
            where = f"prompt {i}: " if len(job.prompts) > 1 else ""
            printer.fail(f"{where}{error}")
