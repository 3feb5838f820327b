"""Best-of-N: sample N responses, keep the one with the highest reward."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fastguide.config import Rule
from fastguide.engine import Engine
from fastguide.engine.text import Prompt
from fastguide.request import Completion, SamplingParams
from fastguide.rewards import Reward, Sample, judge


@dataclass(frozen=True)
class BestOfN:
    """What to search for: ``n`` responses, judged by ``reward``."""

    reward: Reward
    n: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n is {self.n!r}; allowed are whole numbers from 1")


@dataclass(frozen=True)
class Choice:
    """The outcome for one prompt.

    Attributes:
        prompt: its index in the call.
        best: the response with the highest reward; ties go to the earlier sample. None where no
            response could be judged.
        completions: all responses, best included, in the order of their samples.
        rewards: theirs; None where one could not be judged.
        failures: why, for each of those.
    """

    prompt: int
    best: Completion | None
    completions: list[Completion]
    rewards: list[float | None]
    failures: list[str] = field(default_factory=list)

    @property
    def reward(self) -> float | None:
        """The best response's."""
        return None if self.best is None else self.rewards[self.completions.index(self.best)]


def best_of_n(
    engine: Engine,
    prompts: Sequence[str],
    search: BestOfN,
    *,
    rule: Rule | None = None,
    weights: Mapping[str, float] | None = None,
    sampling: SamplingParams | None = None,
    asked: Sequence[Prompt] | None = None,
) -> Iterator[Choice]:
    """The best of N responses to each prompt; the samples of a prompt share its cache.

    Args:
        engine: samples the responses, guided too if ``rule`` says so.
        prompts: texts, as the reward reads them.
        search: how many, and who judges.
        rule: of all responses; None is the policy alone.
        weights: of the guides.
        sampling: ``n`` of it is not used; sample i draws with ``sample_seed(seed, i)``.
        asked: what the engine is given in their place, such as chats with these texts.

    Yields:
        A choice as soon as the responses to its prompt are there. An interrupt (Ctrl-C) is raised
        again after a choice from what there is of each prompt that had begun.

    Raises:
        ValueError: greedy sampling of several responses, which would all be the same.
    """
    base = sampling or SamplingParams()
    if base.temperature == 0 and search.n > 1:
        raise ValueError("temperature is 0, at which all responses are the same; allowed is more")
    params = dataclasses.replace(base, n=search.n)
    groups: dict[int, list[Completion]] = {}
    try:
        for completion in engine.completions(list(asked or prompts), rule, weights, params):
            group = groups.setdefault(completion.prompt, [])
            group.append(completion)
            # A prompt that was refused has one completion, which says why.
            if len(group) == search.n or completion.error is not None:
                done = groups.pop(completion.prompt)
                yield choose(prompts[completion.prompt], done, search.reward)
    except KeyboardInterrupt:
        for prompt, group in groups.items():
            yield choose(prompts[prompt], group, search.reward)
        raise


def choose(prompt: str, completions: Sequence[Completion], reward: Reward) -> Choice:
    """The best of responses to one prompt."""
    ordered = sorted(completions, key=lambda c: c.sample)
    sound = [c for c in ordered if c.error is None]
    values, failed = judge(reward, [Sample(prompt, c.text, len(c.token_ids)) for c in sound])
    found = dict(zip((c.sample for c in sound), values, strict=True))
    rewards = [found.get(c.sample) for c in ordered]
    judged = [(value, -i) for i, value in enumerate(rewards) if value is not None]
    best = ordered[-max(judged)[1]] if judged else None
    reasons = [f"sample {sound[f.sample].sample}: {f.reason}" for f in failed]
    return Choice(ordered[0].prompt, best, ordered, rewards, reasons)


def best_weights(total: int, n: int) -> list[float]:
    """How likely each of ``total`` responses, from worst to best, is the best of a random n.

    Raises:
        ValueError: n is not 1 to ``total``.
    """
    if not 1 <= n <= total:
        raise ValueError(f"n is {n}; allowed are 1 to {total}, the number of responses")
    # The i-th smallest is the best of n if the others are among the i - 1 below it.
    ways = math.comb(total, n)
    return [math.comb(i, n - 1) / ways for i in range(total)]


def expected_best(rewards: Sequence[float], n: int) -> float:
    """The mean reward of the best of n, over all ways to take n of these without replacement.

    So one set of 128 responses estimates best-of-n for every n up to 128, without bias.

    Raises:
        ValueError: n is not 1 to the number of rewards.
    """
    shares = best_weights(len(rewards), n)
    return math.fsum(w * value for w, value in zip(shares, sorted(rewards), strict=True))


def kl_of_best(n: int) -> float:
    """KL divergence of best-of-n from the policy, in nats: ``log n - (n - 1) / n``.

    Exact where no two responses have one reward, else an upper bound (Beirami et al., 2024).
    """
    return math.log(n) - (n - 1) / n
