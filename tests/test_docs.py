"""What README and docs say is true: snippets run, commands and files exist, tables are current."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from fastguide.cli import app
from fastguide.cli.demo import PROMPTS, SETTINGS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def block(name: str, page: Path = ROOT / "README.md") -> str:
    """What stands between a pair of marks in a page."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert found is not None, name
    return found[1].strip()


def script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def refresh() -> ModuleType:
    """``docs/refresh_readme.py`` as a module."""
    return script("docs/refresh_readme.py")


SNIPPETS = [
    pytest.param(code, id=f"{name}-{i}")
    for name in NAMES
    for i, code in enumerate(blocks((ROOT / name).read_text(encoding="utf-8"), "python"))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_runs(code: str) -> None:
    """Each block alone, as a reader would copy it."""
    try:
        exec(compile(code, "block", "exec"), {})
    finally:
        if "ray" in sys.modules:  # other tests want a cluster of their own
            sys.modules["ray"].shutdown()


def commands() -> list[tuple[str, str]]:
    """Every command line that a page shows, with its page."""
    found = []
    for name in NAMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for code in blocks(text, "console") + blocks(text, "text"):
            found += [(name, line) for line in re.findall(r"^\$ (.+)$", code, re.MULTILINE)]
        found += [(name, line) for line in re.findall(r"`((?:make|python|fastguide) [^`]+)`", text)]
        found += [(name, line) for line in re.findall(r"^  (fastguide .+)$", text, re.MULTILINE)]
    return [(name, " ".join(line.split())) for name, line in found]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_exist(page: str, line: str) -> None:
    """Targets of make, files of python, commands and options of fastguide."""
    program, *arguments = shlex.split(line.split("|")[-1], comments=True)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
    elif program == "python":
        if arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1]) is not None
        else:
            assert (ROOT / arguments[0]).is_file()
    elif program not in ("pip", "source") and arguments[0] not in ("--help", "COMMAND"):
        assert program == "fastguide"
        command = get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
        if arguments[0] == "train" and arguments[1:]:
            command, arguments = command.commands[arguments[1]], arguments[1:]
        if arguments[1:]:  # else it is only named
            command.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("name", NAMES)
def test_links_and_named_files_exist(name: str) -> None:
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for target, function in re.findall(
        r"`((?:fastguide|kernels|tests|csrc)/[\w./]+)(?:: (\w+))?", text
    ):
        assert (ROOT / target).exists(), target
        if function:
            source = (ROOT / target).read_text(encoding="utf-8")
            assert re.search(rf"(?:class|def) {function}\b", source), f"{target}: {function}"


def test_the_tree_lists_real_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = blocks(text.partition("## Files")[2], "text")
    parent = ROOT
    for line in tree.splitlines():
        entry = line.split()[0]
        indented = line.startswith("  ")
        assert ((parent if indented else ROOT) / entry).exists(), entry
        if not indented:
            parent = ROOT / entry


@pytest.mark.parametrize("name", script("docs/refresh_readme.py").TABLES)
def test_tables_are_those_of_the_records(refresh: ModuleType, name: str) -> None:
    """``python docs/refresh_readme.py --tables`` makes them current."""
    page, table = refresh.TABLES[name]
    assert block(name, page) == table().strip()


def test_the_demo_block_is_of_this_demo() -> None:
    """``python docs/refresh_readme.py`` makes it current."""
    shown = block("demo")
    for words in (*PROMPTS, *(setting.name for setting in SETTINGS), "Try next:"):
        assert words in shown


def test_the_picture_is_of_this_model() -> None:
    """``python docs/draw_step.py`` makes it current, and gives the same on another machine."""
    draw = script("docs/draw_step.py")
    numbers = re.compile(r"-?\d+(?:\.\d+)?")
    kept = (ROOT / "docs/step.svg").read_text(encoding="utf-8")
    drawn = draw.draw(draw.step())
    assert numbers.sub("0", drawn) == numbers.sub("0", kept)
    found, expected = (list(map(float, numbers.findall(text))) for text in (drawn, kept))
    assert found == pytest.approx(expected, abs=0.02)
    assert not re.search(r"\d\.\d{3}", kept)


@pytest.mark.parametrize("path", ["docs/draw_step.py", "docs/refresh_readme.py"])
def test_scripts_have_help_and_write_nothing_for_it(path: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / path, "--help"], capture_output=True, text=True, check=True
    )
    assert "usage:" in done.stdout


@pytest.mark.parametrize("name", ["cheerful", "brief"])
def test_cards_say_what_was_trained_on(name: str) -> None:
    """Not the responses that were held out."""
    folder = ROOT / "fastguide/assets" / name
    facts = json.loads((folder / "guide_config.json").read_text(encoding="utf-8"))["training"]
    trained_on = facts["rollouts"] - facts["validation_episodes"]
    card = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    assert f"on {trained_on:,} responses of `stories`" in card
