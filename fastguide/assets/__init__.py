"""Packaged models and guides: the small story model and the guides trained on it.

A packaged name is the name of a folder beside this file: ``stories`` (a language model),
``cheerful`` and ``brief`` (value guides for it). This module uses the standard library only.
"""

from __future__ import annotations

from pathlib import Path

MODEL = "stories"
"""The packaged language model; every other packaged name is a guide on it."""

_ROOT = Path(__file__).resolve().parent


def names() -> list[str]:
    """Sorted names of the packaged folders."""
    return sorted(
        entry.name
        for entry in _ROOT.iterdir()
        if (entry / "config.json").is_file() or (entry / "guide_config.json").is_file()
    )


def guides() -> list[str]:
    """Sorted names of the packaged guides."""
    return [name for name in names() if name != MODEL]


def packaged(name: str) -> Path:
    """Folder of the packaged model or guide ``name``; ValueError when there is none."""
    if name not in names():
        raise ValueError(f"no packaged model is called {name!r}; there are {', '.join(names())}")
    return _ROOT / name


def resolve(name_or_path: str | Path) -> str:
    """The packaged folder when ``name_or_path`` is a packaged name, else the argument itself.

    A packaged name means the packaged folder wherever one stands; a folder of that name in the
    working directory is given as ``./NAME`` or as a ``Path``. Anything else (a path, a hub id) is
    returned unchanged, as a string.
    """
    text = str(name_or_path)
    packaged_name = text in names() and not isinstance(name_or_path, Path)
    return str(_ROOT / text) if packaged_name else text


def absolute(name_or_path: str | Path) -> str:
    """The argument as it can be written down: the same from another working directory."""
    here = str(name_or_path) not in names() or isinstance(name_or_path, Path)
    folder = Path(name_or_path)
    return str(folder.resolve()) if here and folder.is_dir() else str(name_or_path)
