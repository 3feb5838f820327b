"""The small collection that tests look at."""

from __future__ import annotations

from fastguide.train.collect import CollectConfig

CONFIG = CollectConfig(samples_per_prompt=2, max_tokens=6, shard_prompts=2, seed=3)
PROMPTS = [[0, 424, 439], [0, 424], [0, 323, 447, 442], [0, 424, 439], [0, 281]]


class Killed(Exception):
    """Stands for the end of a process."""
