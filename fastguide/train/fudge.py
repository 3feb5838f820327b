"""FUDGE: a classifier of prefixes tells whether the finished response will have an attribute.

Yang and Klein, NAACL 2021: binary cross-entropy on every prefix of a response, the label being
that of the whole. Decoding adds log sigma of the classifier's logit (``fastguide.FUDGE``).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastguide.train.episodes import Episode, EpisodeBatch
from fastguide.train.prefix import PrefixTrainer
from fastguide.train.settings import PrefixConfig


@dataclasses.dataclass
class FudgeConfig(PrefixConfig):
    """``PrefixConfig``; a prefix classifier has no hyper-parameters of its own."""


def attributes(episodes: Sequence[Episode], above: float | None = None) -> list[Episode]:
    """Episodes with the reward 1 where theirs is larger than ``above``, else 0.

    Args:
        episodes: rewarded at their end.
        above: in the unit of their rewards; None is ``default_border``.

    Raises:
        ValueError: all have the attribute, or none; or rewards are paid per token.
    """
    if any(episode.token_reward for episode in episodes):
        raise ValueError("the reward is paid per token; an attribute needs one paid at the end")
    border = default_border(episodes) if above is None else above
    labelled = [dataclasses.replace(e, reward=float(e.reward > border)) for e in episodes]
    share = statistics.fmean(e.reward for e in labelled)
    if share in (0.0, 1.0):
        raise ValueError(
            f"{'all' if share else 'none'} of {len(labelled)} responses have a reward above the "
            "border; a classifier needs both"
        )
    return labelled


def default_border(episodes: Sequence[Episode]) -> float:
    """The median reward, or the largest below the largest of all, if that is less."""
    rewards = sorted(e.reward for e in episodes)
    below = [reward for reward in rewards if reward < rewards[-1]]
    return min(statistics.median(rewards), below[-1]) if below else rewards[-1]


class FudgeTrainer(PrefixTrainer):
    """Trains a ``ValueModel`` as a classifier; episodes' rewards are 0 or 1 (``attributes``).

    Validation gives ``eval_loss``, the cross-entropy in nats, and ``eval_accuracy``, both the mean
    over all prefixes; ``eval_last_accuracy``, of whole responses; and ``eval_majority``, the
    accuracy of whoever always gives the more frequent answer.
    """

    def losses(self, values: Tensor, batch: EpisodeBatch) -> Tensor:
        """Binary cross-entropy of the logit of each prefix."""
        label = batch.rewards.sum(1, keepdim=True).expand_as(values)
        return F.binary_cross_entropy_with_logits(
            values[batch.states], label[batch.states], reduction="none"
        )

    def statistics(self, values: Tensor, batch: EpisodeBatch) -> Tensor:
        """Right answers, the last one, and the prefixes that have the attribute."""
        label = batch.rewards.sum(1, keepdim=True) > 0.5
        right = ((values > 0) == label) & batch.states
        last = batch.states.sum(dim=1) + batch.states.int().argmax(dim=1) - 1
        having = (label & batch.states).sum(1)
        columns = (right.sum(1), right.gather(1, last[:, None])[:, 0], having)
        return torch.stack([column.double() for column in columns], dim=1)

    def metrics(self, sums: Sequence[float], states: int, episodes: int) -> dict[str, float]:
        """From the sums over all episodes."""
        right, last, having = sums
        return {
            "accuracy": float(right / states),
            "last_accuracy": float(last / episodes),
            "majority": float(max(having, states - having) / states),
        }
