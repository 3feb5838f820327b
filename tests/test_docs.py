"""What README and docs say is true: snippets run, commands and files exist, tables are current."""

from __future__ import annotations

import importlib.util
import re
import shlex
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


def block(name: str) -> str:
    """What stands between a pair of marks in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert found is not None, name
    return found[1].strip()


@pytest.fixture(scope="module")
def refresh() -> ModuleType:
    """``docs/refresh_readme.py`` as a module."""
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "docs/refresh_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [n for n in NAMES if blocks((ROOT / n).read_text(), "python")])
def test_python_runs(name: str) -> None:
    """The blocks of a page run one after the other, as a reader would type them."""
    shared: dict[str, object] = {}
    for i, code in enumerate(blocks((ROOT / name).read_text(encoding="utf-8"), "python")):
        exec(compile(code, f"{name}, block {i}", "exec"), shared)


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
    program, *arguments = shlex.split(line.split("|")[-1])
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    elif arguments[0] not in ("--help", "COMMAND"):
        assert program == "fastguide"
        command = get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
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


@pytest.mark.parametrize("name", ["quality", "speed"])
def test_tables_are_those_of_the_records(refresh: ModuleType, name: str) -> None:
    """``python docs/refresh_readme.py --tables`` makes them current."""
    assert block(name) == refresh.TABLES[name]().strip()


def test_the_demo_block_is_of_this_demo() -> None:
    """``python docs/refresh_readme.py`` makes it current."""
    shown = block("demo")
    for words in (*PROMPTS, *(setting.name for setting in SETTINGS), "Try next:"):
        assert words in shown
