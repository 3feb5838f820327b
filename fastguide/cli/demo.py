"""``fastguide demo``: the same prompts, steered five ways, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from fastguide.cli import options
from fastguide.cli.arguments import parse_guides
from fastguide.cli.demo_view import Mean, Outcome, Setting, propose, show
from fastguide.cli.loading import load_engine
from fastguide.cli.output import opened
from fastguide.config import VAS
from fastguide.request import Completion, SamplingParams

if TYPE_CHECKING:
    from fastguide.engine import Engine

PROMPTS = (
    "It was raining and Sara had to stay at home.",
    "Max was a big dog who lived on a farm.",
)
BETA = 6.0
MAX_TOKENS = 160
"""Shorter than most unguided stories: enough to see what brevity does, in half a minute."""
TEMPERATURE = 0.7
SAMPLES = 8
"""Per prompt and setting; one of them is shown, all of them are in the averages."""


SETTINGS = (
    Setting("unguided", "white", {}),
    Setting("cheerful", "green", {"cheerful": 1.0}),
    Setting("gloomy", "blue", {"cheerful": -1.0}),
    Setting("brief", "yellow", {"brief": 1.0}),
    Setting("cheerful + brief", "magenta", {"cheerful": 1.0, "brief": 1.0}),
)


def demo(
    prompt: options.DemoPrompts = None,
    max_tokens: options.DemoMaxTokens = MAX_TOKENS,
    samples: options.DemoSamples = SAMPLES,
    beta: options.DemoBeta = BETA,
    seed: options.DemoSeed = 0,
) -> None:
    """Show the same stories unguided and steered; side by side from 130 columns."""
    from fastguide.engine.progress import progress

    prompts = tuple(prompt or PROMPTS)
    rule = VAS(beta=beta)
    sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=max_tokens, seed=seed, n=samples)
    engine = load_engine(None, parse_guides(["cheerful", "brief"]))
    outcomes: list[Outcome] = []
    with opened(None):
        try:
            with progress(len(SETTINGS), what="settings") as note:
                for i, setting in enumerate(SETTINGS):
                    note(i)
                    outcomes.append(run(engine, setting, prompts, rule, sampling))
        except KeyboardInterrupt:
            if outcomes:
                show(prompts, outcomes, rule, sampling)
            done = f"{len(outcomes)} of {len(SETTINGS)} settings"
            typer.echo(f"interrupted after {done}", err=True)
            raise
        show(prompts, outcomes, rule, sampling)
        propose()


def run(
    engine: Engine,
    setting: Setting,
    prompts: Sequence[str],
    rule: VAS,
    sampling: SamplingParams,
) -> Outcome:
    """Sample every prompt under one setting and judge the responses.

    Raises:
        GenerationError: for prompts that cannot be completed.
    """
    completions = engine.generate(
        list(prompts),
        rule if setting.weights else None,
        setting.weights or None,
        sampling,
        progress=False,
    )
    return Outcome(
        setting,
        completions,
        cheerfulness=Mean.of(list(_cheerfulness(completions))),
        tokens=Mean.of([float(len(c.token_ids)) for c in completions]),
        kl=Mean.of([sum(c.kl) for c in completions]),
    )


def _cheerfulness(completions: Sequence[Completion]) -> Iterator[float]:
    from fastguide.assets import packaged
    from fastguide.models.guide_config import GuideConfig
    from fastguide.rewards import cheerfulness

    scale = GuideConfig.load(packaged("cheerful")).reward
    yield from scale.standardise(cheerfulness(c.text) for c in completions)
