"""Writing files so that whoever is killed leaves them as they were, or as they should be."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A file beside ``file`` to write; at the end of the block it takes its place, all at once.

    Where the block raises, ``file`` stays what it was.
    """
    part = file.with_name(f"{file.name}.part")
    yield part
    with part.open("rb") as stream:
        os.fsync(stream.fileno())  # else a power cut could leave the new name with nothing in it
    os.replace(part, file)


class Draft:
    """What is finished of something that is not whole yet: parts, each on a line of its own.

    Being killed costs the last at most.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def add(self, part: Any) -> None:
        """Keep a part, plain data."""
        with self._file.open("ab") as stream:  # begins a line: the last one may be cut off
            stream.write(b"\n" + json.dumps(part).encode() + b"\n")

    def parts(self) -> Iterator[Any]:
        """All whole parts."""
        for line in self._file.read_bytes().split(b"\n") if self._file.is_file() else ():
            with contextlib.suppress(ValueError):
                if line:
                    yield json.loads(line)

    def drop(self) -> None:
        """All of it is whole, and elsewhere."""
        self._file.unlink(missing_ok=True)
