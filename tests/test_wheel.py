"""The wheel holds what an installation needs, and its demo runs outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fastguide.kernels import native

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "kernels", "fastguide")
BUILT = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "*.egg-info")
LARGEST_ASSETS = 16 * 2**20


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, started as a user would, outside the tree."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no earlier build can lend it a file."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=BUILT)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("fastguide-*.whl")
    return built


@pytest.fixture(scope="module")
def held(wheel: Path) -> dict[str, int]:
    """Name and size of every file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which borrows the dependencies of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False, symlinks=os.name != "nt")
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    )
    # An editable fastguide stays behind: .pth files of a folder named in a .pth are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return scripts


# The folders of the packaged models and guides, with the files that hold their weights.
WEIGHTS = {
    "stories": "model.safetensors",
    "cheerful": "value_head.safetensors",
    "brief": "value_head.safetensors",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_packaged_models(held: dict[str, int], name: str) -> None:
    """Needs the packaged guides, which the recipe in examples/stories makes."""
    assert held[f"fastguide/assets/{name}/{WEIGHTS[name]}"] > 0
    assert any(
        file.startswith(f"fastguide/assets/{name}/") and file.endswith(".md") for file in held
    )


def test_every_asset_is_held(held: dict[str, int]) -> None:
    assets = (path for path in (ROOT / "fastguide" / "assets").rglob("*") if path.is_file())
    names = {
        path.relative_to(ROOT).as_posix() for path in assets if "__pycache__" not in path.parts
    }
    assert names <= held.keys()


def test_assets_are_small(held: dict[str, int]) -> None:
    sizes = {name: size for name, size in held.items() if name.startswith("fastguide/assets/")}
    assert sum(sizes.values()) <= LARGEST_ASSETS, sizes


def test_code_and_licence(held: dict[str, int]) -> None:
    for name in (
        "fastguide/__init__.py",
        "fastguide/py.typed",
        "fastguide/kernels/reference/__init__.py",
    ):
        assert name in held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    tops = {name.split("/")[0] for name in held}
    assert all(top.startswith("fastguide") for top in tops), tops


def test_native_extension(held: dict[str, int]) -> None:
    """Held where the machine can build it, which it could for this installation."""
    assert any(name.startswith("fastguide/_C.") for name in held) == native.available()


def test_the_installed_package_is_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import fastguide, fastguide.kernels as k\n"
        "print(fastguide.__file__, k.__file__, k.native.available(), sep='\\n')\n"
    )
    *places, available = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert all(Path(place).is_relative_to(installed.parent) for place in places), places
    assert available == str(native.available())


def test_demo(installed: Path, tmp_path: Path) -> None:
    """Needs the packaged guides and the command line."""
    assert run(installed / "fastguide", "demo", "--max-tokens", "8", cwd=tmp_path).strip()
