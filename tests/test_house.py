"""The house rules that a reader relies on: who imports whom, how long a file is, which versions."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Who may import whom. Arrows compose: a unit may also import what lies below its arrows. A unit is
# a package or module below fastguide/, or kernels/, which is imported as fastguide.kernels.
ARROWS: dict[str, set[str]] = {
    "_C": set(),
    "kernels": {"_C"},
    "config": set(),
    "request": set(),
    "prompts": set(),
    "lazy": set(),
    "files": set(),
    "assets": set(),
    "slots": set(),
    "prefix_index": {"slots"},
    "cache": {"config", "prefix_index"},
    "models": {"kernels", "cache", "config", "assets"},
    "scorer": {"models", "cache"},
    "guides": {"scorer", "request", "assets"},
    "engine": {"guides", "models", "cache", "kernels", "assets"},
    "rewards": {"models", "lazy"},
    "search": {"engine", "rewards"},
    "blackbox": {"guides", "kernels"},
    "train": {"ray", "models", "kernels", "engine", "guides", "rewards", "files"},
    "evaluate": {"engine", "search", "guides", "rewards", "prompts", "files"},
    "serve": {"engine", "guides"},
    "ray": {"engine", "guides"},
    "integrations": {"engine", "guides"},
}
# These are at the top and may import everything.
EVERYTHING = {"__init__", "__main__", "cli"}

# Units that keep to the standard library, but for the packages named here.
THIRD_PARTY: dict[str, set[str]] = {
    "kernels": {"torch", "triton"},
    "config": set(),
    "request": set(),
    "prompts": set(),
    "lazy": set(),
    "files": set(),
    "assets": set(),
    "slots": {"numpy"},
    "prefix_index": {"numpy"},
    "cache": {"torch", "numpy"},
}

LONGEST_FILE = 400


def files(*patterns: str) -> list[Path]:
    folders = ("fastguide", "kernels", "csrc", "tests", "benchmarks", "examples")
    found = (path for f in folders for pattern in patterns for path in (ROOT / f).rglob(pattern))
    return sorted(path for path in found if "runs" not in path.relative_to(ROOT).parts)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fastguide", *parts) if parts[0] == "kernels" else parts)


def unit(module: str) -> str:
    """The unit that a module of fastguide belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import, those inside functions included."""
    package = module.removesuffix(".__init__").split(".")
    if not module.endswith(".__init__"):
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            if name == "fastguide":
                yield from ((node.lineno, f"fastguide.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, name


def below(name: str) -> set[str]:
    """All units that can be reached from a unit along the arrows."""
    reached: set[str] = set()
    ahead = set(ARROWS[name])
    while ahead:
        following = ahead.pop()
        reached.add(following)
        ahead |= ARROWS[following] - reached
    return reached


def violations(module: str, source: str) -> list[str]:
    home = unit(module)
    if home in EVERYTHING:
        return []
    found = []
    for line, name in imports(module, source):
        top = name.split(".")[0]
        if top == "fastguide":
            other = unit(name)
            if other != home and other not in below(home):
                found.append(f"{module}:{line} imports {name}: no arrow {home} -> {other}")
        elif home in THIRD_PARTY and top not in THIRD_PARTY[home] | set(sys.stdlib_module_names):
            found.append(f"{module}:{line} imports {name}: {home} may not need {top}")
    return found


# --------------------------------------------------------------------------------- imports


def test_the_arrows_have_no_cycle() -> None:
    assert not [name for name in ARROWS if name in below(name)]


def test_every_unit_has_its_arrows() -> None:
    modules = [module_name(p) for p in files("*.py")]
    units = {unit(module) for module in modules if module.split(".")[0] == "fastguide"}
    assert units - EVERYTHING <= ARROWS.keys()


def test_imports_follow_the_arrows() -> None:
    found = []
    for path in files("*.py"):
        module = module_name(path)
        if module.split(".")[0] == "fastguide":
            found += violations(module, path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("fastguide.scorer", "from fastguide.models.decoder import Decoder", False),
        ("fastguide.scorer", "from fastguide import guides", True),
        ("fastguide.scorer", "from fastguide import Engine", True),
        ("fastguide.scorer", "import fastguide.engine", True),
        ("fastguide.scorer", "def f():\n    from fastguide.engine import Engine", True),
        ("fastguide.models.__init__", "from .decoder import Decoder", False),
        ("fastguide.models.__init__", "from ..engine import Engine", True),
        ("fastguide.models.value", "from ..kernels import reference", False),
        ("fastguide.models.value", "from .. import engine", True),
        ("fastguide.kernels.native", "import fastguide._C as _C", False),
        ("fastguide.kernels.native", "import transformers", True),
        ("fastguide.config", "import torch", True),
        ("fastguide.cli.main", "from fastguide import Engine", False),
    ],
)
def test_the_check_sees_what_it_should(module: str, source: str, wrong: bool) -> None:
    assert bool(violations(module, source)) == wrong


@pytest.mark.parametrize("name", ["fastguide", "fastguide.train", "fastguide.rewards"])
def test_type_checkers_see_what_is_imported_lazily(name: str) -> None:
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__ or "").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {
        alias.name: (node.module or "").removeprefix(f"{name}.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == package._HOME
    assert set(shown) <= set(package.__all__) <= set(dir(package))
    for each in package.__all__:
        assert getattr(package, each) is not None
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'other'"):
        _ = package.other


# ----------------------------------------------------------------------------------- files


def test_no_file_is_called_utils() -> None:
    assert not [path for path in files("*") if path.stem in ("utils", "util", "helpers", "misc")]


def test_every_file_fits_in_one_reading() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files("*.py", "*.cpp", "*.hpp", "*.h")
    }
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}


def test_kernels_is_no_top_level_package() -> None:
    """Transformers imports another package called kernels: ours must not stand in its way."""
    assert str(ROOT) not in sys.path
    assert "" not in sys.path


# -------------------------------------------------------------------------------- versions


@pytest.mark.parametrize("tool", ["ruff", "clang-format"])
def test_hooks_and_the_dev_extra_pin_the_same_version(tool: str) -> None:
    pinned = re.compile(rf'"{tool}==([0-9.]+)"')
    extra = pinned.findall((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hooks = pinned.findall((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert len(extra) == 1
    assert hooks
    assert set(hooks) == set(extra)


def test_the_version_is_written_once() -> None:
    import fastguide

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    stated = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert stated is not None
    assert fastguide.__version__ == stated[1]
