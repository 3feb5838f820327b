"""What is finished of something that is not whole yet, in a file that a kill leaves readable."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Draft:
    """Finished parts, each on a line of its own; being killed costs the last at most."""

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
