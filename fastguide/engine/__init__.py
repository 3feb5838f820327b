"""The engine and its parts; ``runner.py`` shows where a token's logits go."""

from fastguide.engine.aio import AsyncEngine
from fastguide.engine.engine import Engine
from fastguide.engine.stats import CacheStats, EngineStats

__all__ = ["AsyncEngine", "CacheStats", "Engine", "EngineStats"]
