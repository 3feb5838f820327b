"""Decoding above the token: whole responses compete."""

from fastguide.search.best_of_n import (
    BestOfN,
    Choice,
    best_of_n,
    best_weights,
    expected_best,
    kl_of_best,
)

__all__ = ["BestOfN", "Choice", "best_of_n", "best_weights", "expected_best", "kl_of_best"]
