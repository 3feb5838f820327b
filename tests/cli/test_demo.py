"""``fastguide demo``, and the commands that it proposes."""

from __future__ import annotations

import importlib
import os
import shlex

import pytest
from rich.console import Console

from fastguide.cli import demo_view
from fastguide.cli.demo import SETTINGS, Mean

demo_module = importlib.import_module("fastguide.cli.demo")  # beside a function of that name
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


def test_one_response_has_no_interval(run):
    shown = run("demo", "--max-tokens", 1, "--n", 1, "--prompt", "The dog").stdout
    words = " ".join(shown.split())
    assert "Means of 1 response each (1 prompt, 1 sample), too few for an interval" in words
    assert "at most 1 token." in words
    assert "(1 token)" in words
    assert words.count("± –") == 3 * len(SETTINGS)


def test_an_interrupt_is_told_and_ends_like_that_of_generate(run, monkeypatch):
    done = []

    def interrupted(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return judge(*arguments)

    judge = demo_module.run
    monkeypatch.setattr(demo_module, "run", interrupted)
    result = run("demo", *TINY)
    assert result.exit_code == 130
    assert result.stderr == "interrupted after 1 of 5 settings\n"
    assert "unguided" in result.stdout
    assert "gloomy" not in result.stdout
    assert "Try next" not in result.stdout
    result = run("demo", *TINY)
    assert result.stderr == "interrupted after 0 of 5 settings\n"
    assert result.stdout == ""


@pytest.mark.skipif(os.name == "nt", reason="the commands are those of POSIX shells")
def test_it_tells_how_to_find_the_command(run, monkeypatch, tmp_path):
    scripts = tmp_path / "bin"
    scripts.mkdir()
    monkeypatch.setattr(demo_view.sysconfig, "get_path", lambda name: str(scripts))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f'  export PATH="$PATH:{scripts}"\n' in run("demo", *TINY).stdout
    (scripts / "activate").touch()
    assert f"Try next:\n  source {scripts}/activate\n" in run("demo", *TINY).stdout
    monkeypatch.chdir(tmp_path)
    assert "Try next:\n  source bin/activate\n  fastguide" in run("demo", *TINY).stdout
    command = tmp_path / "fastguide"
    command.touch(mode=0o755)
    assert "Try next:\n  fastguide generate" in run("demo", *TINY).stdout


def test_means():
    assert Mean.of([2.0]) == Mean(2.0, None)
    mean = Mean.of([1.0, 3.0])
    assert mean.value == 2.0
    assert mean.margin == pytest.approx(1.96 * 2**0.5 / 2**0.5)
