"""Paired differences at equal KL, where the truth is known."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from fastguide.evaluate import Runner, difference_table, differences, matched, read_study
from fastguide.evaluate.differences import Family

KLS = (1.0, 2.5, 4.0)
STRENGTHS = ((0.5, 1.0, 2.0, 4.0, 6.0), (0.3, 1.5, 3.0, 5.0))


def family(
    rng: np.random.Generator, hardness: np.ndarray, gain: float, kls: tuple[float, ...], runs: int
) -> Family:
    """A reward of ``gain · KL``, less how hard a prompt is, with noise of runs and of responses."""
    found = []
    for _ in range(runs):
        luck = rng.normal(0, 0.1) if runs > 1 else 0.0
        found.append(
            [
                {
                    i: (
                        float(kl * (1 + rng.normal(0, 0.2))),
                        float(gain * kl - hard + luck + rng.normal(0, 0.3)),
                    )
                    for i, hard in enumerate(hardness)
                }
                for kl in kls
            ]
        )
    return found


def drawn(seed: int, runs: int = 1, prompts: int = 24) -> tuple[Family, Family]:
    """Two families on the same prompts; ours gains 0.1 more per nat."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(0, 1.0, prompts)
    ours = family(rng, hardness, 0.4, STRENGTHS[0], runs)
    return ours, family(rng, hardness, 0.3, STRENGTHS[1], runs)


def test_by_hand() -> None:
    """Lines between (0, 0) and (2, 4), and (1, 0) and (3, 2): at 2 they are 4 and 1."""
    ours = [[{0: (0.0, -1.0), 1: (0.0, 1.0)}, {0: (2.0, 3.0), 1: (2.0, 5.0)}]]
    theirs = [[{0: (3.0, 1.0), 1: (3.0, 3.0)}, {0: (1.0, -1.0), 1: (1.0, 1.0)}]]
    below, at, above = differences(ours, theirs, (0.5, 2.0, 2.5))
    # Both prompts differ alike: pairs leave no spread, where each family alone has some.
    assert at == {"kl": 2.0, "mean": pytest.approx(3.0), "ci95": pytest.approx(0.0, abs=1e-9)}
    assert below == {"kl": 0.5, "mean": None, "ci95": None}
    assert above == {"kl": 2.5, "mean": None, "ci95": None}
    table = difference_table({"ours − theirs": [below, at, above]})
    assert table.splitlines()[0] == "| reward of | KL = 0.5 | KL = 2 | KL = 2.5 |"
    assert table.splitlines()[2] == "| ours − theirs |  | +3.000 ± 0.000 |  |"


@pytest.mark.parametrize("runs", [1, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(runs: int) -> None:
    number, held = 300, np.zeros(len(KLS))
    for seed in range(number):
        for i, found in enumerate(differences(*drawn(seed, runs), KLS, draws=200)):
            held[i] += abs(found["mean"] - 0.1 * found["kl"]) <= found["ci95"]
    # 95 % of 300 within four standard deviations; of runs, what is between prompts counts twice.
    spread = 4 * math.sqrt(0.95 * 0.05 / number)
    assert (held / number).min() > 0.95 - spread
    assert (held / number).max() < (0.95 + spread if runs == 1 else 1.0)


def test_pairs_are_narrower_than_families_apart() -> None:
    """With the prompts of one family in another order, nothing is paired."""
    paired, apart = [], []
    for seed in range(20):
        ours, theirs = drawn(seed)
        rng = np.random.default_rng(seed)
        order = rng.permutation(24)
        mixed = [[{int(order[i]): value for i, value in p.items()} for p in theirs[0]]]
        paired.append(differences(ours, theirs, KLS, draws=200)[1])
        apart.append(differences(ours, mixed, KLS, draws=200)[1])
    assert [p["mean"] for p in paired] == pytest.approx([a["mean"] for a in apart])
    widths = [statistics.fmean(d["ci95"] for d in found) for found in (paired, apart)]
    assert widths[0] < widths[1] / 3  # noise 0.3 of responses against 1 of prompts


def test_runs_that_differ_widen_the_interval() -> None:
    ours, theirs = drawn(0, runs=1)
    shifted = [
        [{i: (kl, y + more) for i, (kl, y) in point.items()} for point in ours[0]]
        for more in (-0.5, 0.0, 0.5)
    ]
    alike = differences(ours * 3, theirs * 3, KLS)
    apart = differences(shifted, theirs * 3, KLS)
    for one, other in zip(alike, apart, strict=True):
        assert other["mean"] == pytest.approx(one["mean"])
        expected = 4.3027 * 0.5 / math.sqrt(3)  # Student's of three runs
        assert other["ci95"] == pytest.approx(math.hypot(one["ci95"], expected), rel=0.1)


def test_the_same_seed_gives_the_same_interval() -> None:
    ours, theirs = drawn(0)
    assert differences(ours, theirs, KLS) == differences(ours, theirs, KLS)
    assert differences(ours, theirs, KLS) != differences(ours, theirs, KLS, seed=1)


def test_prompts_that_a_point_lacks_are_left_out_everywhere() -> None:
    ours, theirs = drawn(0)
    fewer = [[{i: p[i] for i in range(20)} for p in family[0]] for family in (ours, theirs)]
    expected = differences([fewer[0]], [fewer[1]], KLS)
    assert differences([[*ours[0][:-1], fewer[0][-1]]], [fewer[1]], KLS) == expected


def test_what_cannot_be_compared_is_refused() -> None:
    ours, theirs = drawn(0)
    with pytest.raises(ValueError, match="families are of 2 and 1 runs; allowed are the same"):
        differences(ours * 2, theirs, KLS)
    with pytest.raises(ValueError, match="have 0 prompts in common; allowed are 2 or more"):
        differences(ours, [[{99: (0.0, 0.0)}, {99: (9.0, 1.0)}]], KLS)
    with pytest.raises(ValueError, match=r"a family have \[1\] points; allowed is one number"):
        differences(ours, [theirs[0][:1]], KLS)


def test_studies_give_families(study: Path, tmp_path: Path) -> None:
    """Of best-of-N, too: the mean of a prompt's winners, at the KL of best-of-N."""
    runner = Runner(read_study(study), tmp_path)
    results = {result["point"]: result for result in runner.run()}
    for method in ("VAS", "BoN"):
        names = [p.name for p in runner.study.points if p.method == method]
        for name, point in zip(names, runner.frontier(method, y="sentiment"), strict=True):
            assert set(point) == {0, 1}
            kls, rewards = zip(*point.values(), strict=True)
            assert statistics.fmean(kls) == pytest.approx(results[name]["kl"]["mean"])
            assert statistics.fmean(rewards) == pytest.approx(results[name]["sentiment"]["mean"])
    at = min(results[name]["kl"]["mean"] for name in ("VAS beta=4", "BoN best_of=3")) / 2
    (found,) = differences([runner.frontier("VAS")], [runner.frontier("BoN")], [at])
    one, other = (
        matched(*([r[name]["mean"] for r in points] for name in ("kl", "reward")), at=at)
        for method in ("VAS", "BoN")
        if (points := [r for r in results.values() if r["method"] == method])
    )
    assert one is not None
    assert other is not None
    assert found["mean"] == pytest.approx(one - other)
