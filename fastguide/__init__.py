"""fastguide steers language models while they decode.

At every step it takes the base model's top-k next tokens, asks value or reward models how good
each continuation is, folds the scores into the base distribution and samples.
"""

from typing import TYPE_CHECKING

from fastguide.lazy import lazily

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastguide.config import ARGS as ARGS, FUDGE as FUDGE, VAS as VAS, Plain as Plain
    from fastguide.engine import (
        AsyncEngine as AsyncEngine,
        Engine as Engine,
        EngineStats as EngineStats,
    )
    from fastguide.guides import (
        FunctionGuide as FunctionGuide,
        RewardGuide as RewardGuide,
        ValueGuide as ValueGuide,
    )
    from fastguide.request import (
        Completion as Completion,
        GenerationError as GenerationError,
        GenerationInterrupt as GenerationInterrupt,
        Piece as Piece,
        SamplingParams as SamplingParams,
    )
    from fastguide.scorer import TreeScorer as TreeScorer

_HOME = {
    "ARGS": "config",
    "FUDGE": "config",
    "VAS": "config",
    "Plain": "config",
    "AsyncEngine": "engine",
    "Engine": "engine",
    "EngineStats": "engine",
    "FunctionGuide": "guides",
    "RewardGuide": "guides",
    "ValueGuide": "guides",
    "Completion": "request",
    "GenerationError": "request",
    "GenerationInterrupt": "request",
    "Piece": "request",
    "SamplingParams": "request",
    "TreeScorer": "scorer",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = lazily(__name__, _HOME)
