"""``python -m fastguide.cli``, for environments without the console script."""

from fastguide.cli import main

main()
