"""Writing files so that whoever is killed leaves them as they were, or as they should be."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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
