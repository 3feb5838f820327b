"""Prompts for training and for judging: openings of stories."""

from __future__ import annotations

import random
from pathlib import Path

from fastguide.rewards import sentences

SEPARATOR = "<|endoftext|>"


def read_stories(file: Path) -> list[str]:
    """Stories of a text file, separated by ``<|endoftext|>``."""
    text = file.read_text(encoding="utf-8")
    return [story.strip() for story in text.split(SEPARATOR) if story.strip()]


def training_prompts(stories: list[str], count: int, seed: int) -> list[str]:
    """``count`` openings: the first sentence or two, the first few words, or the classic start.

    Stories are taken in turn, so that with more prompts than stories a story comes again, cut
    elsewhere.
    """
    rng = random.Random(seed)
    prompts = []
    for i in range(count):
        story = stories[i % len(stories)]
        kind = rng.random()
        if kind < 0.45:
            prompts.append(sentences(story)[0])
        elif kind < 0.60:
            prompts.append(" ".join(sentences(story)[:2]))
        elif kind < 0.67:
            prompts.append("Once upon a time")
        else:
            prompts.append(" ".join(story.split()[: rng.randint(2, 14)]))
    return prompts


def heldout_prompts(stories: list[str], count: int = 64) -> list[str]:
    """First sentences of the first ``count`` stories."""
    return [sentences(story)[0] for story in stories[:count]]
