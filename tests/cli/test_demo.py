"""``fastguide demo``, and the commands that it proposes."""

from __future__ import annotations

import shlex

import pytest
from rich.console import Console

from fastguide.cli import demo_view
from fastguide.cli.demo import SETTINGS, Mean

TINY = ("--max-tokens", 6, "--n", 2)


def test_the_demo_shows_every_setting_with_its_averages(run):
    result = run("demo", *TINY)
    assert result.exit_code == 0, result.output
    for setting in SETTINGS:
        assert setting.name.split()[0] in result.stdout
    assert "cheerfulness" in result.stdout
    assert "Means of 4 responses each (2 prompts, 2 samples)" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "\x1b" not in result.stdout
    assert result.stdout == run("demo", *TINY).stdout


def test_prompts_of_ones_own(run):
    result = run("demo", *TINY, "--prompt", "The dog", "--beta", 0, "--seed", 4)
    assert "The dog" in result.stdout
    assert "Sara" not in result.stdout.partition("Try next")[0]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_it_fits_the_terminal(run, monkeypatch, width):
    printed = Console(width=width, force_terminal=True, record=True, highlight=False)
    monkeypatch.setattr(demo_view, "Console", lambda **options: printed)
    assert run("demo", *TINY).exit_code == 0
    lines = printed.export_text().partition("Try next")[0].splitlines()
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("command", demo_view.NEXT)
def test_what_it_proposes_works(run, command):
    program, *arguments = shlex.split(command)
    assert program == "fastguide"
    result = run(*arguments, "--max-tokens", 8)
    assert result.exit_code == 0, result.output


def test_means():
    assert Mean.of([2.0]) == Mean(2.0, 0.0)
    mean = Mean.of([1.0, 3.0])
    assert mean.value == 2.0
    assert mean.margin == pytest.approx(1.96 * 2**0.5 / 2**0.5)
