"""Draw one decode step of the packaged model as ``docs/step.svg``, with the numbers it really has.

python docs/draw_step.py
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import torch

from fastguide import VAS, Engine, ValueGuide
from fastguide.kernels import reference

PREFIX = "The little dog was very"
GUIDE = "cheerful"
RULE = VAS(beta=8.0, k=20)
TEMPERATURE = 0.7
SHOWN = 5
TARGET = Path(__file__).with_name("step.svg")

INK, DIM, PALE, BASE, GUIDED = "#24292f", "#6e7781", "#eaeef2", "#8c959f", "#1a7f37"


class Candidate(NamedTuple):
    """One candidate token with its numbers before and after."""

    text: str
    base: float
    value: float
    guided: float


def step() -> list[Candidate]:
    """Score the candidates of one step, most likely first."""
    engine = Engine(guides={GUIDE: ValueGuide(GUIDE)}, dtype="float32")
    policy, scorer = engine.runner.policy, engine.runner.scorers[GUIDE]
    prefix = engine.tokenizer(PREFIX)["input_ids"]
    logits = policy.run([policy.open(prefix)])
    inverse = torch.full((1,), RULE.lower(TEMPERATURE).inv_temperature)
    z, ids, lse = reference.topk_logsumexp(logits, RULE.k, inverse)
    (values,) = scorer.score([scorer.open(prefix)], ids.tolist())
    bonus = RULE.beta * (values - values.mean()).double()
    inside = torch.logsumexp(z[0].double(), -1)
    tail = lse[0].double() + torch.log1p(-torch.exp(inside - lse[0].double()))
    total = torch.logaddexp(torch.logsumexp(z[0].double() + bonus, -1), tail)
    return [
        Candidate(
            engine.tokenizer.decode([int(ids[0, i])]).strip(),
            math.exp(z[0, i] - lse[0]),
            float(values[i]),
            math.exp(z[0, i].double() + bonus[i] - total),
        )
        for i in range(SHOWN)
    ]


def number(value: float) -> str:
    """A coordinate, to two decimals: what another machine computes differs in later ones."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def text(x: float, y: float, words: str, size: int = 14, colour: str = INK, **others: str) -> str:
    """One line of text; ``anchor`` and ``weight`` are optional."""
    extra = f' text-anchor="{others["anchor"]}"' if "anchor" in others else ""
    extra += f' font-weight="{others["weight"]}"' if "weight" in others else ""
    family = others.get("family", "system-ui, Segoe UI, Helvetica, Arial, sans-serif")
    return (
        f'<text x="{number(x)}" y="{number(y)}" font-size="{size}" fill="{colour}" '
        f'font-family="{family}"{extra}>{escape(words)}</text>'
    )


def box(x: float, y: float, width: float, height: float, fill: str, line: str = "none") -> str:
    """A rounded rectangle."""
    return (
        f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" '
        f'height="{number(height)}" rx="3" fill="{fill}" stroke="{line}"/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, arrow: bool = False) -> str:
    """A thin line, with a head if it is an arrow."""
    head = ' marker-end="url(#head)"' if arrow else ""
    way = f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}"
    return f'<path d="{way}" stroke="{DIM}" fill="none"{head}/>'


def share(probability: float) -> str:
    """A probability with two digits."""
    return f"{probability:.2f}" if probability >= 0.005 else "< 0.01"


def draw(candidates: list[Candidate]) -> str:
    """The whole picture, 960 by 340."""
    top, row, length = 122, 32, 140
    first, last = top + 11, top + row * (SHOWN - 1) + 11
    best = max(c.guided for c in candidates)
    below = top + row * SHOWN + 14
    parts = [
        box(1, 1, 958, 338, "#ffffff", PALE),
        text(24, 32, "1  base model: one pass", weight="600"),
        text(24, 52, f"top-k tokens (k = {RULE.k}), log-sum-exp of all", 12, DIM),
        text(352, 32, "2  guide: one pass", weight="600"),
        text(352, 52, "k rows over one shared prefix cache", 12, DIM),
        text(684, 32, "3  rule: VAS, eq. 4", weight="600"),
        text(684, 52, f"p ∝ p₀ · exp(β V), β = {RULE.beta:g}", 12, DIM),
        box(24, 72, 190, 26, PALE),
        text(119, 90, PREFIX, 13, anchor="middle"),
        box(352, 72, 190, 26, PALE),
        text(447, 90, PREFIX, 13, anchor="middle"),
        line(372, 98, 372, last),
        line(69, 98, 69, first - 14, arrow=True),
    ]
    for i, c in enumerate(candidates):
        y = top + row * i
        parts += [
            text(92, y + 16, c.text, 13, anchor="end"),
            box(102, y, max(2.0, length * c.base), 22, BASE),
            text(110 + length * c.base, y + 16, share(c.base), 12, DIM),
            line(290, y + 11, 340, y + 11, arrow=True),
            line(372, y + 11, 396, y + 11),
            box(398, y, 88, 22, PALE, GUIDED if c.guided == best else "none"),
            text(442, y + 16, c.text, 13, anchor="middle"),
            text(500, y + 16, f"V = {c.value:+.2f}", 13),
            line(596, y + 11, 668, y + 11, arrow=True),
            box(684, y, max(2.0, length * c.guided), 22, GUIDED),
            text(692 + length * c.guided, y + 16, share(c.guided), 12, DIM),
        ]
    parts += [
        text(24, below, "all other tokens keep their base logit", 12, DIM),
        text(684, below, "drawn by (seed, position)", 12, DIM),
        text(24, below + 32, "4  append:", weight="600"),
        text(
            104,
            below + 32,
            "the drawn token keeps its slot in the guide's cache, the other k − 1 slots are free "
            "again; nothing is copied",
            13,
        ),
    ]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 340" role="img">'
        "<title>One step of guided decoding</title>"
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        f'<path d="M0 0L6 3L0 6z" fill="{DIM}"/></marker></defs>'
    )
    return head + "\n".join(parts) + "</svg>\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    TARGET.write_text(draw(step()), encoding="utf-8")
    print(TARGET)
