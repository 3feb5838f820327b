"""Win rates by a language model that judges (VAS appendix F), behind any OpenAI-compatible API.

Every pair is asked twice, its order swapped, and both answers count: a judge that prefers the first
place gives a tie.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastguide.rewards import MOST_FAILURES

SYSTEM = (
    "You are a helpful assistant whose goal is to decide on a preferred answer to a question in a "
    'dialogue. Answer by printing only a single choice from ["Output (a)", "Output (b)"] '
    "(without quotes) for each example, one per line, with no other text."
)

TASK = (
    "In this task, you select the preferred output of AI models. You will read a batch of {n} "
    "examples, each composed of an instruction, Output (a) from one system and Output (b) from "
    "another. Read all examples first; then say for each which output is better, using only "
    "Output (a) or Output (b), without explanation."
)

_ANSWER = re.compile(r"output\s*\(?([ab])\)?", re.IGNORECASE)


class Pair(NamedTuple):
    """Two responses to one prompt."""

    prompt: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class Judge:
    """A model behind ``POST {url}/chat/completions``.

    Attributes:
        url: of the API, such as ``http://localhost:8000/v1``.
        model: its name there.
        key_variable: environment variable that holds the API key, if one is needed.
        batch: examples of one question; the paper asks for 5.
        workers: questions at once.
        attempts: how often a question is asked before it counts as unanswered.
        seconds: most to wait for an answer.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    batch: int = 5
    workers: int = 4
    attempts: int = 3
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; allowed are http:// and https:// addresses")
        for name in ("batch", "workers", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; allowed are whole numbers from 1"
                )

    def wins(
        self, pairs: Sequence[Pair], on_progress: Callable[[int], None] | None = None
    ) -> list[float | None]:
        """1 where ours wins in both orders, 0 where theirs does, 0.5 where the orders disagree.

        Returns:
            One number per pair; None where the judge gave no answer that can be read.

        Raises:
            ValueError: more than 5 % of the pairs have none: how many, and why the last.
        """
        reasons: list[str] = []
        batches = [pairs[i : i + self.batch] for i in range(0, len(pairs), self.batch)]
        questions = [(batch, swapped) for batch in batches for swapped in (False, True)]
        answers: list[list[bool] | None] = []
        with ThreadPoolExecutor(self.workers) as pool:
            for found in pool.map(lambda q: self._ask(q[0], q[1], reasons), questions):
                answers.append(found)
                if on_progress is not None:
                    on_progress(len(answers))
        wins: list[float | None] = []
        for batch, plain, swapped in zip(batches, answers[::2], answers[1::2], strict=True):
            if plain is None or swapped is None:
                wins += [None] * len(batch)
            else:
                wins += [(a + (not b)) / 2 for a, b in zip(plain, swapped, strict=True)]
        missing = wins.count(None)
        if missing > MOST_FAILURES * len(pairs):
            raise ValueError(
                f"the judge {self.model!r} at {self.url} gave no answer on {missing} of "
                f"{len(pairs)} pairs (allowed are 5 %), last: {reasons[-1]}"
            )
        return wins

    def _ask(self, batch: Sequence[Pair], swapped: bool, reasons: list[str]) -> list[bool] | None:
        """Whether (a) is preferred, for each example; None without a readable answer."""
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question(batch, swapped)},
            ],
            "temperature": 0,
            "max_tokens": 16 * len(batch),
        }
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(2.0**attempt, 30.0))
            try:
                text = self._post(body)
            except urllib.error.HTTPError as error:
                said = error.read(500).decode(errors="replace")
                reasons.append(f"HTTP {error.code}: {' '.join(said.split())}")
                continue
            except (OSError, ValueError, LookupError) as error:
                reasons.append(f"{type(error).__name__}: {error}")
                continue
            found = [choice.lower() == "a" for choice in _ANSWER.findall(text)]
            if len(found) == len(batch):
                return found
            reasons.append(f"an answer with {len(found)} choices for {len(batch)}: {text!r:.200}")
        return None

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=self.seconds) as answer:
            return str(json.loads(answer.read())["choices"][0]["message"]["content"])


def question(batch: Sequence[Pair], swapped: bool) -> str:
    """The text of one question; swapped, ours is Output (b)."""
    parts = [TASK.format(n=len(batch))]
    for i, (prompt, ours, theirs) in enumerate(batch, start=1):
        first, second = (theirs, ours) if swapped else (ours, theirs)
        parts.append(
            f"## Example {i}\n\n### Instruction {i}:\n{prompt}\n\n### Output (a) for example {i}:\n"
            f"{first}\n\n### Output (b) for example {i}:\n{second}"
        )
    parts.append(
        f"## Preferred output for examples 1 to {len(batch)}\n"
        "Now give all the preferred outputs, one per line."
    )
    return "\n\n".join(parts)
