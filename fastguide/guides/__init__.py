"""Guides: anything that gives each candidate continuation a scalar; higher is better."""

from fastguide.guides.base import Guide, LoadContext
from fastguide.guides.function import FunctionGuide
from fastguide.guides.reward import RewardGuide
from fastguide.guides.value import ValueGuide

__all__ = ["FunctionGuide", "Guide", "LoadContext", "RewardGuide", "ValueGuide"]
