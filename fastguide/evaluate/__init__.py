"""What guides buy: rewards, KL, diversity, win rates and costs of methods, side by side."""

from fastguide.evaluate.differences import difference_table, differences
from fastguide.evaluate.judge import Judge, Pair
from fastguide.evaluate.metrics import Coherence, Estimate, diversity, matched, win_rate
from fastguide.evaluate.read import read_study
from fastguide.evaluate.run import Runner
from fastguide.evaluate.study import Point, Study

__all__ = [
    "Coherence",
    "Estimate",
    "Judge",
    "Pair",
    "Point",
    "Runner",
    "Study",
    "difference_table",
    "differences",
    "diversity",
    "matched",
    "read_study",
    "win_rate",
]
