"""Responses of the policy, their labels, and the padded batches that the trainer reads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from fastguide.models.guide_config import RewardScale
from fastguide.train.rewards import REWARDS, scale_of, standardise


@dataclass(frozen=True)
class Rollout:
    """One sampled response; ``response_ids`` includes the eos if one was produced."""

    prompt: int
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finish_reason: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Rollout:
        raw = json.loads(line)
        ids = {name: tuple(raw.pop(name)) for name in ("prompt_ids", "response_ids")}
        return cls(**raw, **ids)


@dataclass(frozen=True)
class Episode:
    """One labelled response: its states are s_0 (the prompt) to s_T (after the last token).

    ``response_ids`` includes the eos if one was produced; ``reward`` is standardised.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reward: float

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("an episode needs at least one prompt token, got none")

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class EpisodeBatch(NamedTuple):
    """Right-padded episodes; B rows, T the longest of them.

    Fields: ``input_ids [B, T]`` int64 (0 at padding), ``states [B, T]`` bool (the positions that
    hold s_0 .. s_T: the last prompt token to the last response token), ``rewards [B, T]`` fp32
    (the reward at s_T, 0 elsewhere) and ``returns [B]`` fp32 (the same reward).
    """

    input_ids: torch.Tensor
    states: torch.Tensor
    rewards: torch.Tensor
    returns: torch.Tensor

    def to(self, device: torch.device | str) -> EpisodeBatch:
        return EpisodeBatch(*(tensor.to(device) for tensor in self))


def label(
    rollouts: Sequence[Rollout],
    reward: str,
    decode: Callable[[Sequence[int]], str],
    max_tokens: int | None = None,
) -> tuple[list[Episode], RewardScale]:
    """Episodes with standardised rewards, and the scale that standardises them.

    Args:
        rollouts: of the unguided policy.
        reward: a name in ``REWARDS``.
        decode: token ids to text without special tokens.
        max_tokens: cut responses to this many tokens first; the first tokens of a longer
            response are a response sampled with that limit.
    """
    if reward not in REWARDS:
        raise ValueError(f"unknown reward {reward!r}; there are {', '.join(sorted(REWARDS))}")
    responses = [rollout.response_ids[:max_tokens] for rollout in rollouts]
    raw = [REWARDS[reward](decode(response), response) for response in responses]
    scale = scale_of(reward, raw)
    episodes = [
        Episode(rollout.prompt_ids, response, value)
        for rollout, response, value in zip(
            rollouts, responses, standardise(raw, scale), strict=True
        )
    ]
    return episodes, scale


def collate(episodes: Sequence[Episode]) -> EpisodeBatch:
    """Pad episodes on the right, so that a causal model needs no mask for them."""
    shape = (len(episodes), max(len(episode) for episode in episodes))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    states = torch.zeros(shape, dtype=torch.bool)
    rewards = torch.zeros(shape)
    for row, episode in enumerate(episodes):
        tokens = episode.prompt_ids + episode.response_ids
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        states[row, len(episode.prompt_ids) - 1 : len(tokens)] = True
        rewards[row, len(tokens) - 1] = episode.reward
    return EpisodeBatch(input_ids, states, rewards, rewards.sum(dim=1))


def bucketed(
    episodes: Sequence[Episode], batch_size: int, seed: int, pool: int = 32
) -> list[list[int]]:
    """One epoch's batches of indices, shuffled by ``seed``, rows of like length together.

    Shuffled indices are cut into pools of ``pool`` batches, sorted by length inside a pool and
    cut into batches; the batches are shuffled again. Every index occurs once.
    """
    rng = random.Random(seed)
    order = list(range(len(episodes)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), batch_size * pool):
        chunk = sorted(order[start : start + batch_size * pool], key=lambda i: len(episodes[i]))
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    return batches
