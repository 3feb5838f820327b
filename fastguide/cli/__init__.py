"""The command line: ``fastguide generate`` and ``fastguide demo``.

Nothing here imports torch before a command runs, so that ``fastguide --help`` is instant.
"""

from fastguide.cli.app import app, main

__all__ = ["app", "main"]
