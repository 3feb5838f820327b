"""From the responses of a point to estimates: means over prompts, KL, win rates, costs.

Of best-of-N, every estimate is the expectation for the winner over all ways to take N of a prompt's
responses: each response counts with the probability that it wins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastguide.evaluate.metrics import Estimate, win_rate
from fastguide.models.decoder import weights_of
from fastguide.rewards import Reward, WeightedSum
from fastguide.search import best_weights, kl_of_best

Row = dict[str, Any]
"""One response: prompt, sample, text, token_ids, kl, seconds, rewards by name, and so on."""

Shares = Mapping[int, Sequence[tuple[float, Row]]]
"""By prompt, responses with the probability that each is the answer."""


def shares(rows: Sequence[Row], best_of: int) -> Shares:
    """The probabilities of a point's responses; those without a reward have none."""
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row["reward"] is not None:
            groups[row["prompt"]].append(row)
    found: dict[int, list[tuple[float, Row]]] = {}
    for prompt, group in groups.items():
        ranked = sorted(group, key=lambda row: row["reward"])
        weights = best_weights(len(ranked), min(best_of, len(ranked)))
        found[prompt] = list(zip(weights, ranked, strict=True))
    return found


def means(of: Shares, name: str) -> dict[int, float]:
    """By prompt, the expectation of a number, over the responses that have it."""
    found = {}
    for prompt, group in of.items():
        known = [(share, row[name]) for share, row in group if row[name] is not None]
        if total := sum(share for share, _ in known):
            found[prompt] = sum(share * value for share, value in known) / total
    return found


def mean(of: Shares, name: str) -> Estimate:
    """The estimate of a number, over the responses that have it."""
    values = {prompt: [value] for prompt, value in means(of, name).items()}
    count = sum(row[name] is not None for prompt in values for _, row in of[prompt])
    return Estimate.of(values, responses=count)


def kl(of: Shares, best_of: int) -> Estimate:
    """KL from the study's policy, in nats.

    That of best-of-N is ``kl_of_best(N)`` from what competes (at most), and from the policy more by
    the winner's log-ratio of the two.
    """
    if best_of == 1:
        return mean(of, "kl")
    ratio = mean(of, "log_ratio")
    if ratio.mean is None:
        return ratio
    return Estimate(ratio.mean + kl_of_best(best_of), ratio.ci95, ratio.responses)


def kl_and_reward(
    rows: Sequence[Row], best_of: int, y: str = "reward"
) -> dict[int, tuple[float, float]]:
    """By prompt, KL and a reward of a point; prompts that lack one are left out."""
    of = shares(rows, best_of)
    more = kl_of_best(best_of)
    kls, rewards = means(of, "kl" if best_of == 1 else "log_ratio"), means(of, y)
    return {p: (kls[p] + more, rewards[p]) for p in kls.keys() & rewards.keys()}


def wins(ours: Shares, theirs: Shares) -> Estimate:
    """How often our answer has the higher reward than theirs to the same prompt; ties half."""

    def rewards(of: Shares) -> dict[int, list[tuple[float, float]]]:
        return {p: [(share, row["reward"]) for share, row in group] for p, group in of.items()}

    return win_rate(rewards(ours), rewards(theirs))


def answers(rows: Sequence[Row], best_of: int) -> dict[int, Row]:
    """One answer to each prompt: the best of its first ``best_of`` responses."""
    found: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row["sample"]):
        if row["sample"] < best_of and row["reward"] is not None:
            best = found.get(row["prompt"])
            if best is None or row["reward"] > best["reward"]:
                found[row["prompt"]] = row
    return found


def reward_weights(reward: Reward) -> int:
    """Weights of the classifiers that a reward asks."""
    if isinstance(reward, WeightedSum):
        return sum(reward_weights(part) for _, part in reward.parts)
    model = getattr(reward, "model", None)
    return 0 if model is None else weights_of(model)


def costs(
    rows: Sequence[Row], best_of: int, policy: int, guides: Sequence[int], reward: int
) -> Iterator[tuple[str, float]]:
    """What one answer takes: 2 FLOPs per weight and token, and seconds of this run.

    Args:
        rows: of the point.
        best_of: responses that compete; they share the prompt.
        policy: weights of the policy.
        guides: weights of each guide in use; it reads the prompt, and the candidates.
        reward: weights of the reward, which reads prompt and response; 0 if it is no model.
    """
    number = len(rows)
    tokens = sum(row["tokens"] for row in rows) / number
    prompt = sum(row["prompt_tokens"] for row in rows) / number
    seconds = sum(row["seconds"] for row in rows) / number
    yield "policy_flops", 2.0 * policy * (prompt + best_of * tokens)
    scored = sum(row["scored"] for row in rows) / number
    yield "guide_flops", sum(2.0 * guide * (prompt + best_of * scored) for guide in guides)
    # Records call what the reward takes judge_flops and judge_seconds; no language model is meant.
    rewarding = sum(row["judge_seconds"] for row in rows) / number if best_of > 1 else 0.0
    yield "judge_flops", 2.0 * reward * best_of * (prompt + tokens) if best_of > 1 else 0.0
    yield "tokens_per_second", tokens / best_of / (seconds + rewarding)
    yield "seconds_per_response", best_of * (seconds + rewarding)
