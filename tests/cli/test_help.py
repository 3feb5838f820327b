"""What a newcomer sees first."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
from typer.main import get_command

from fastguide import __version__
from fastguide.cli import app

COMMANDS = ("generate", "demo", "collect", "label", "validate", "evaluate")


def test_help_fits_a_screen(run):
    result = run("--help")
    lines = result.stdout.rstrip("\n").splitlines()
    assert result.exit_code == 0
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_shown_once(run, command):
    result = run(command, "--help")
    lines = result.stdout.splitlines()
    shown = re.findall(r"(?m)^\W*(--[a-z-]+)", result.stdout)
    declared = [p.opts[0] for p in get_command(app).commands[command].params if p.opts[0][0] == "-"]
    assert sorted(shown) == sorted([*declared, "--help"])
    assert max(map(len, lines)) <= 80


def test_nothing_typed_shows_the_help(run):
    assert "Commands" in run().output


def test_version(run):
    assert run("--version").stdout == f"fastguide {__version__}\n"


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from fastguide.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    best = 9.0
    for _ in range(3):  # the best of three: this machine may be busy
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        best = min(best, time.perf_counter() - started)
    assert best < 1.0


def test_unknown_option_is_refused(run):
    result = run("generate", "Once", "--bogus")
    assert result.exit_code == 2
    assert "--bogus" in result.stderr


def test_benchmarks_have_help_of_their_own(run):
    done = subprocess.run(
        [sys.executable, "-m", "fastguide.cli", "bench", "ops", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: fastguide bench ops" in done.stdout
    for words in (["bench"], ["bench", "--help"]):
        assert "Time fastguide beside" in run(*words).stdout
