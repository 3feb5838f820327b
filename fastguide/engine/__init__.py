"""The engine and its parts; ``runner.py`` shows where a token's logits go."""

from fastguide.engine.engine import Engine

__all__ = ["Engine"]
