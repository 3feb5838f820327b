"""Responses of the policy with their rewards, and the padded batches that the trainer reads."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastguide.models.guide_config import RewardScale


@dataclass(frozen=True)
class Rollout:
    """One sampled response; ``response_ids`` includes the eos if one was produced.

    ``prompt_text`` is what rewards read as the prompt, where that is not the decoded
    ``prompt_ids``: what was said, without the chat template around it.
    """

    prompt: int
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finish_reason: str
    prompt_text: str | None = None


@dataclass(frozen=True)
class Episode:
    """One labelled response: its states are s_0 (the prompt) to s_T (after the last token).

    ``response_ids`` includes the eos if one was produced. ``reward`` is paid at s_T and
    ``token_reward`` at each of s_1 to s_T; both are in standard units.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reward: float
    token_reward: float = 0.0

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("an episode needs at least one prompt token, got none")

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class EpisodeBatch(NamedTuple):
    """Right-padded episodes; B rows, T the longest of them.

    Fields: ``input_ids [B, T]`` int64 (0 at padding), ``states [B, T]`` bool (the positions that
    hold s_0 .. s_T: the last prompt token to the last response token) and ``rewards [B, T]`` fp32
    (what is paid on entering each state).
    """

    input_ids: torch.Tensor
    states: torch.Tensor
    rewards: torch.Tensor

    def to(self, device: torch.device | str) -> EpisodeBatch:
        """The batch on ``device``."""
        return EpisodeBatch(*(tensor.to(device) for tensor in self))


def episodes_of(
    rollouts: Iterable[Rollout],
    rewards: Iterable[float | None],
    name: str,
    *,
    max_tokens: int | None = None,
    per_token: float = 0.0,
) -> tuple[list[Episode], RewardScale]:
    """Episodes with standardised rewards, and the scale that standardises them.

    ``(raw - mean) / std`` over unguided responses is the unit in which guides are trained, so that
    beta means the same for every guide. An episode pays its reward at the end, or token by token
    if the reward is a constant times the number of tokens: then a value is what is still to come.
    It differs from the value of the same reward paid at the end by what is past, which all
    candidates of a step share: guidance is the same, but the model need not count the past.

    Args:
        rollouts: of the unguided policy.
        rewards: one each; None leaves the rollout out.
        name: of the reward.
        max_tokens: cut responses to this many tokens first, as they were judged.
        per_token: the reward of every token, if it is such a reward; else 0.

    Raises:
        ValueError: the rewards do not vary.
    """
    pairs = [(r, x) for r, x in zip(rollouts, rewards, strict=True) if x is not None]
    responses = [rollout.response_ids[:max_tokens] for rollout, _ in pairs]
    raw = [reward for _, reward in pairs]
    scale = RewardScale.of(name, raw, per_token=per_token != 0)
    if scale.per_token:
        ends, tokens = [0.0] * len(raw), per_token / scale.std
    else:
        ends, tokens = scale.standardise(raw), 0.0
    episodes = [
        Episode(rollout.prompt_ids, response, end, tokens)
        for (rollout, _), response, end in zip(pairs, responses, ends, strict=True)
    ]
    return episodes, scale


def mean_return(episodes: Iterable[Episode], gamma: float) -> float:
    """The discounted return from a state on, what it pays included, averaged over all states.

    Args:
        episodes: one or more.
        gamma: discount, in [0, 1].

    Returns:
        In standard units, as the episodes' rewards.
    """
    total, states = 0.0, 0
    for episode in episodes:
        left = episode.reward
        for _ in episode.response_ids:
            left += episode.token_reward
            total += left
            left *= gamma
        total += left  # s_0 pays nothing
        states += len(episode.response_ids) + 1
    return total / states


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
        rewards[row, len(episode.prompt_ids) : len(tokens)] = episode.token_reward
        rewards[row, len(tokens) - 1] += episode.reward
    return EpisodeBatch(input_ids, states, rewards)


def bucketed(
    episodes: Sequence[Episode], batch_size: int, seed: int, pool: int = 32
) -> list[list[int]]:
    """One epoch's batches of indices, shuffled by ``seed``, rows of like length together.

    Shuffled indices are cut into pools of ``pool`` batches, sorted by length inside a pool and
    cut into batches; the batches are shuffled again, a short one at the end. Every index occurs
    once.
    """
    rng = random.Random(seed)
    order = list(range(len(episodes)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), batch_size * pool):
        chunk = sorted(order[start : start + batch_size * pool], key=lambda i: len(episodes[i]))
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    # The one that is short comes last: read as one sequence, all others are cut where they were.
    whole = [batch for batch in batches if len(batch) == batch_size]
    rng.shuffle(whole)
    return whole + [batch for batch in batches if len(batch) < batch_size]
