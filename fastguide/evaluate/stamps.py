"""What tells models and rewards from others of the same name, so that nothing stale is reused."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from fastguide.assets import names, packaged, resolve
from fastguide.models.guide_config import CONFIG_FILE, GuideConfig

SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".py")
"""Files that a model's answers depend on."""


def stamp(path: str | None) -> str:
    """What tells a model folder from the same folder with other weights; a hub id is itself.

    A guide that is an adapter or a head stands for its base model, too, unless that is packaged.

    Args:
        path: of a model, a guide or ``reward:PATH``; None is the packaged model.
    """
    folder = _folder(path)
    if folder is None:
        return str(path)
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    found, base = f"{path} {_digest(tuple(map(_version, files)))}", _base(folder)
    return found if base is None else f"{found} on {stamp(str(base)).split()[-1]}"


def stamp_reward(spec: str | Sequence[str]) -> str:
    """What tells a reward from one of the same name: a classifier's weights, a module's text."""
    specs = [spec] if isinstance(spec, str) else list(spec)
    return " + ".join(_stamp_part(text) for text in specs)


def _folder(path: str | None) -> Path | None:
    folder = Path(resolve(str(path).removeprefix("reward:"))) if path else None
    return folder if folder is not None and folder.is_dir() else None


def _base(folder: Path) -> Path | None:
    """The folder whose weights a guide's are added to; packaged ones never change."""
    whole = not (folder / "adapter_config.json").is_file()
    if not (folder / CONFIG_FILE).is_file():
        return None
    config = GuideConfig.load(folder)
    if whole and not config.frozen:
        return None
    beside = folder / config.base_model
    base = (beside if beside.is_dir() else Path(resolve(config.base_model))).resolve()
    return base if base.is_dir() and base not in map(packaged, names()) else None


def _version(file: Path) -> tuple[Path, int, int]:
    facts = file.stat()
    return file.absolute(), facts.st_size, facts.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 of names, sizes and contents; read again when a size or time has changed."""
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _stamp_part(text: str) -> str:
    _, _, rest = text.rpartition("*") if "*" in text.partition(":")[0] else ("", "", text)
    kind, _, where = rest.partition(":")
    if kind == "classifier":
        path = where if Path(where).exists() else where.rpartition("?")[0] or where
        return f"{text} {stamp(path)}"
    if where and kind not in ("regex", "checker"):
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(kind)
            if found is not None and found.origin is not None and Path(found.origin).is_file():
                return f"{text} {hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()}"
    return text
