"""``fastguide demo``: the same prompts, steered five ways, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from fastguide.cli import options
from fastguide.cli.arguments import parse_guides
from fastguide.cli.live import progress
from fastguide.cli.loading import load_engine
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


@dataclass(frozen=True)
class Setting:
    """One column of the demo: what it is called and how it weighs the guides."""

    name: str
    style: str
    weights: dict[str, float]


SETTINGS = (
    Setting("unguided", "white", {}),
    Setting("cheerful", "green", {"cheerful": 1.0}),
    Setting("gloomy", "blue", {"cheerful": -1.0}),
    Setting("brief", "yellow", {"brief": 1.0}),
    Setting("cheerful + brief", "magenta", {"cheerful": 1.0, "brief": 1.0}),
)


@dataclass(frozen=True)
class Mean:
    """A mean with the half width of its 95 % interval."""

    value: float
    margin: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of independent values; no interval for a single one."""
        spread = stdev(values) if len(values) > 1 else 0.0
        return cls(fmean(values), 1.96 * spread / len(values) ** 0.5)


@dataclass(frozen=True)
class Outcome:
    """What a setting gave: its completions and their averages."""

    setting: Setting
    completions: list[Completion]
    cheerfulness: Mean
    """In standard deviations of the unguided responses that the guide was trained on."""
    tokens: Mean
    kl: Mean
    """Per response, in nats."""


def demo(
    prompt: options.DemoPrompts = None,
    max_tokens: options.DemoMaxTokens = MAX_TOKENS,
    samples: options.DemoSamples = SAMPLES,
    beta: options.DemoBeta = BETA,
    seed: options.DemoSeed = 0,
) -> None:
    """Show the same stories unguided and steered, side by side."""
    from fastguide.cli import demo_view

    prompts = tuple(prompt or PROMPTS)
    rule = VAS(beta=beta)
    sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=max_tokens, seed=seed, n=samples)
    engine = load_engine(None, parse_guides(["cheerful", "brief"]), dtype="float32")
    outcomes: list[Outcome] = []
    try:
        with progress(len(SETTINGS)) as note:
            for i, setting in enumerate(SETTINGS):
                note(i, f"writing: {setting.name}")
                outcomes.append(run(engine, setting, prompts, rule, sampling))
    except KeyboardInterrupt:
        demo_view.show(prompts, outcomes, rule, sampling)
        raise
    demo_view.show(prompts, outcomes, rule, sampling)


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
    from fastguide.train.rewards import cheerfulness, standardise

    scale = GuideConfig.load(packaged("cheerful")).reward
    yield from standardise((cheerfulness(c.text, c.token_ids) for c in completions), scale)
