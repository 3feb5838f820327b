"""A folder of Parquet shards and the manifest that says which of them are whole.

A shard counts once the manifest names it; both are written under a temporary name and renamed. What
is finished of a shard before that stands in its draft. So whoever is killed at any moment finds,
when started again, what was finished and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastguide.files import Draft, replacing

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
FORMAT_VERSION = 2
NAME = re.compile(r"\w[\w.-]*")


def parquet() -> Any:
    """``pyarrow.parquet``, or how to get it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("this needs pyarrow: pip install 'fastguide[train]'") from error
    return pyarrow.parquet


class Shards:
    """Series of numbered shards in one folder, such as responses and their labels.

    Args:
        folder: made if needed.
        about: what the folder is of; it is continued only with the same. None takes a folder as
            it is, which must exist.

    Raises:
        ValueError: nothing is there to take, or something else than what ``about`` says.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any] | None = None) -> None:
        parquet()  # said before anything is sampled
        self.folder = Path(folder)
        file = self.folder / MANIFEST_FILE
        manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if manifest is not None and about is not None and _empty(manifest, self.folder):
            file.unlink()  # nothing is lost by beginning anew
            manifest = None
        if manifest is None:
            if about is None:
                raise ValueError(f"no rollouts at {self.folder}: {MANIFEST_FILE} is missing")
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest = {"format_version": FORMAT_VERSION, "about": about, "series": {}}
        if manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format_version {manifest.get('format_version')!r}; "
                f"this version reads {FORMAT_VERSION}"
            )
        if about is not None and manifest["about"] != about:
            raise ValueError(
                f"{self.folder} holds rollouts with {_differences(manifest['about'], about)}; "
                "choose another folder or delete it"
            )
        self._manifest = manifest

    @property
    def about(self) -> dict[str, Any]:
        """What the folder is of."""
        about: dict[str, Any] = self._manifest["about"]
        return about

    @property
    def series(self) -> dict[str, dict[str, Any]]:
        """What is said of each series: ``about``, ``shards`` (rows and SHA-256) and ``of``."""
        series: dict[str, dict[str, Any]] = self._manifest["series"]
        return series

    def begin(self, name: str, of: int, **about: Any) -> None:
        """Begin or continue a series of ``of`` shards.

        Raises:
            ValueError: the name is none for files, or the folder has such a series with other facts
                or another length.
        """
        if not NAME.fullmatch(name):
            raise ValueError(
                f"a name is {name!r}; allowed are letters, digits, and . _ - after the first"
            )
        found = self.series.get(name)
        if found is None or not found["shards"]:
            with self._changing():
                found = self.series.get(name)
                if found is None or not found["shards"]:  # nothing is lost by beginning anew
                    found = self.series[name] = {"about": about, "of": of, "shards": {}}
        facts, given = found["about"] | {"shards": found["of"]}, about | {"shards": of}
        for key in dict.fromkeys([*given, *facts]):
            if facts.get(key) != given.get(key):
                raise ValueError(
                    f"{name!r} in {self.folder} has {key} {facts.get(key)!r}, not "
                    f"{given.get(key)!r}; choose another name or folder"
                )

    def has(self, name: str, number: int) -> bool:
        """Whether a shard is whole."""
        return str(number) in self.series[name]["shards"]

    def complete(self, name: str) -> bool:
        """Whether a series is."""
        found = self.series.get(name)
        return found is not None and len(found["shards"]) == found["of"]

    def write(self, name: str, number: int, table: pa.Table, **facts: Any) -> None:
        """Add a shard; ``facts`` are kept beside its rows and digest."""
        file = self._file(name, number)
        with replacing(file) as part:
            parquet().write_table(table, part)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        entry = {"rows": table.num_rows, "sha256": digest, **facts}
        with self._changing():
            self.series[name]["shards"][str(number)] = entry

    def draft(self, name: str, number: int) -> Draft:
        """What there is of a shard that is not whole yet."""
        return Draft(self.folder / f"{name}-{number:05d}.draft.jsonl")

    def read(self, name: str, number: int) -> pa.Table:
        """A whole shard.

        Raises:
            ValueError: its file is missing or not what was written.
        """
        import pyarrow as pa

        file = self._file(name, number)
        data = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(data).hexdigest() != self.series[name]["shards"][str(number)]["sha256"]:
            raise ValueError(f"the shard {file} is missing or not what was written")
        return parquet().read_table(pa.BufferReader(data))

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """All rows of a complete series, in order.

        Raises:
            ValueError: there is no such series, it is unfinished, or a shard is broken.
        """
        if name not in self.series:
            have = ", ".join(sorted(filter(self.complete, self.series))) or "nothing"
            raise ValueError(f"{self.folder} has no {name!r}; it has {have}")
        if not self.complete(name):
            raise ValueError(f"{name!r} in {self.folder} are unfinished; run that command again")
        for number in range(self.series[name]["of"]):
            yield from self.read(name, number).to_pylist()

    def note(self, **facts: Any) -> None:
        """Keep facts that do not decide whether the folder is continued."""
        if self.notes != self.notes | facts:
            with self._changing():
                self._manifest.setdefault("notes", {}).update(facts)

    @property
    def notes(self) -> dict[str, Any]:
        """What was noted."""
        notes: dict[str, Any] = self._manifest.get("notes", {})
        return notes

    def digest(self, *names: str) -> str:
        """SHA-256 of what the manifest says of these series: of all their rows."""
        facts = [self.about, [self.series[name] for name in names]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _file(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:05d}.parquet"

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the manifest as it is now: others may write other series of this folder."""
        file = self.folder / MANIFEST_FILE
        with _locked(self.folder / LOCK_FILE):
            if file.is_file():
                self._manifest = json.loads(file.read_text(encoding="utf-8"))
            yield
            with replacing(file) as part:
                text = json.dumps(self._manifest, indent=1, sort_keys=True)
                part.write_text(text, encoding="utf-8")


def _empty(manifest: dict[str, Any], folder: Path) -> bool:
    """Whether it names no shard, and none was begun."""
    named = any(series["shards"] for series in manifest.get("series", {}).values())
    return not named and not any(folder.glob("*.draft.jsonl"))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs, with both values; of texts that nobody reads, such as digests, only that."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            if was != now:
                found.append(_differences(was, now))
        elif was != now:
            found.append(f"another {key}" if key == "prompts" else f"{key} {was!r}, not {now!r}")
    return ", ".join(found)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Wait for others who write; where the system has no such locks, nobody waits."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, even if this process is killed
        yield
