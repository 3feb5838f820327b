"""How the demo looks: stories in columns on wide terminals, in rows on narrow ones and in files."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import sysconfig
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastguide.config import VAS
from fastguide.request import Completion, SamplingParams

WIDE = 130
"""Columns from which five stories stand beside each other; below they stand above each other."""
MOST_WIDTH = 170
SHOWN = 320
"""Most characters of a story that are shown."""

NEXT = (
    'fastguide generate "Once upon a time" --guide cheerful:-1 --beta 6 --stream',
    'fastguide generate "Tom had a red ball." --guide cheerful --guide brief:0.5 --beta 6 --json',
    'fastguide generate "Tom had a red ball." --guide cheerful --rule args --weight 4 --k 10',
)
"""What to try after the demo; a test runs them."""


@dataclass(frozen=True)
class Setting:
    """One column of the demo: what it is called and how it weighs the guides."""

    name: str
    style: str
    weights: dict[str, float]


@dataclass(frozen=True)
class Mean:
    """A mean with the half width of its 95 % interval, if there is one."""

    value: float
    margin: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of independent values; no interval for a single one."""
        if len(values) == 1:
            return cls(values[0], None)
        return cls(fmean(values), 1.96 * stdev(values) / len(values) ** 0.5)


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


def show(
    prompts: Sequence[str], outcomes: Sequence[Outcome], rule: VAS, sampling: SamplingParams
) -> None:
    """Print the stories and the averages of the settings that are done: one or more."""
    console = _console()
    lay_out = _columns if console.width >= WIDE and console.is_terminal else _rows
    for i, prompt in enumerate(prompts):
        console.print()
        console.print(Text(prompt, style="bold"))
        console.print(lay_out([(o, _story(o, i)) for o in outcomes]))
    console.print(_averages(outcomes))
    console.print(Text(_legend(len(prompts), rule, sampling), style="dim"))


def propose() -> None:
    """Print what to try next, after what makes the shell find the command."""
    console = _console()
    console.print("\nTry next:")
    for command in (*_activation(), *NEXT):
        console.print(Text(f"  {command}", style="cyan"), soft_wrap=True)


def _console() -> Console:
    console = Console(highlight=False)
    return Console(highlight=False, width=min(console.width, MOST_WIDTH))


def _activation() -> list[str]:
    """The command that puts this environment on the PATH, unless it is there."""
    if shutil.which("fastguide"):
        return []
    scripts = Path(sysconfig.get_path("scripts"))
    activate, here = scripts / "activate", Path.cwd()
    if not activate.is_file():
        return [f'export PATH="$PATH:{scripts}"']
    near = activate.relative_to(here) if activate.is_relative_to(here) else activate
    return [f"source {shlex.quote(str(near))}" if os.name != "nt" else str(near)]


def _legend(prompts: int, rule: VAS, sampling: SamplingParams) -> str:
    responses = prompts * sampling.n
    intervals = "with 95 % intervals" if responses > 1 else "too few for an interval"
    return (
        f"Means of {_count(responses, 'response')} each ({_count(prompts, 'prompt')}, "
        f"{_count(sampling.n, 'sample')}), {intervals}; the stories shown are the first samples. "
        "Cheerfulness: VADER, in standard deviations from the mean of unguided training "
        f"responses. KL: from the base model, per response. VAS, beta {rule.beta:g}, k {rule.k}, "
        f"temperature {sampling.temperature:g}, at most {_count(sampling.max_tokens, 'token')}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _story(outcome: Outcome, prompt: int) -> Text:
    """The beginning of a prompt's first sample, its mood in colour, and its length."""
    found = next(c for c in outcome.completions if c.prompt == prompt and c.sample == 0)
    words = " ".join(found.text.split())
    begun = textwrap.shorten(words, SHOWN, placeholder="")
    story = Text(begun)
    valences = _valences()
    for word in re.finditer(r"[\w']+", begun):
        valence = valences.get(word[0].lower(), 0.0)
        if abs(valence) >= 1.0:
            story.stylize("green" if valence > 0 else "red", word.start(), word.end())
    more = " …" if begun != words or found.finish_reason == "length" else ""
    return story.append(f"{more} ({_count(len(found.token_ids), 'token')})", style="dim")


@functools.cache
def _valences() -> Mapping[str, float]:
    """How cheerful words are, from -4 to 4: the lexicon that the reward itself uses."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    lexicon: Mapping[str, float] = SentimentIntensityAnalyzer().lexicon
    return lexicon


def _columns(stories: Sequence[tuple[Outcome, Text]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
    for outcome, _ in stories:
        table.add_column(Text(outcome.setting.name, style=outcome.setting.style), ratio=1)
    table.add_row(*(story for _, story in stories))
    return table


def _rows(stories: Sequence[tuple[Outcome, Text]]) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    table.add_column(min_width=8, max_width=10)
    table.add_column(ratio=1)
    for outcome, story in stories:
        table.add_row(Text(outcome.setting.name, style=outcome.setting.style), story)
    return table


def _averages(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    table.add_column("cheerfulness, σ", justify="right")
    table.add_column("length, tokens", justify="right")
    table.add_column("KL, nats", justify="right")
    for outcome in outcomes:
        table.add_row(
            Text(outcome.setting.name, style=outcome.setting.style),
            _number(outcome.cheerfulness, "+.2f"),
            _number(outcome.tokens, ".0f"),
            _number(outcome.kl, ".1f"),
        )
    return table


def _number(mean: Mean, form: str) -> str:
    value = round(mean.value, 4) + 0.0  # + 0.0 turns -0.0 into 0.0
    margin = "–" if mean.margin is None else f"{mean.margin:{form.lstrip('+')}}"
    return f"{value:{form}} ± {margin}"
