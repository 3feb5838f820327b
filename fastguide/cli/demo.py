"""``fastguide demo``: the same prompts, steered five ways, side by side."""

import typer

def demo() -> None:
    """Show the same stories unguided and steered, side by side."""
