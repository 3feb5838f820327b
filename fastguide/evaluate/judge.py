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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, NamedTuple

from fastguide.files import Draft
from fastguide.rewards import MOST_FAILURES

SYSTEM = (
    "You are helpful assistant whose goal is to decide on {goal}.\n"
    'Answer the question by printing only a single choice from ["Output (a)", "Output (b)"] '
    "(without quotes) corresponding to the correct answer with no other text."
)

TASK = """\
In this task, we will ask you to select the preferred output AI model's responses.

You will read a batch of examples, which are composed of the following:

1. {what}
2. Output (a), the first output from the AI system
3. Output (b), the second output from the AI system

I will give you a batch of {n} examples. Your task is to decide which response is better for each \
example. You should answer using only Output (a) or Output (b) depending on which response is \
better.

You should read all the examples first and then select the preferred answers by saying only \
Output (a) or Output (b), one line for each example, without explanation."""

WORDS = {
    True: (
        "a preferred answer to a question in a dialogue",
        'A beginning of a conversation between an AI system ("Assistant") and a user ("User")',
    ),
    False: (
        "a preferred output for a given instruction",
        "An Instruction we give to the AI system",
    ),
}
"""What is asked for and what examples begin with, of chats (appendix F.2) and of texts (F.1)."""

REFUSALS = (401, 403, 404)
"""HTTP codes that every question would get: no key, a wrong one, no such model or address."""

AGAIN = (408, 409, 425, 429)
"""Those of a client's errors that may pass."""

_ANSWER = re.compile(r"\W*(?:(?:example\s*)?\d+\W+)?output\W*([ab])\W*", re.IGNORECASE)
"""A line that says nothing but its choice, after its number if it has one."""


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
        chat: prompts are what a user says, not texts to go on with.
        options: entries of a request's body, such as ``{"max_tokens": 2000}``, beside or in place
            of ours; None leaves one out.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    batch: int = 5
    workers: int = 4
    attempts: int = 3
    seconds: float = 120.0
    chat: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not str(self.url).startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; allowed are http:// and https:// addresses")
        for name in ("model", "key_variable"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise ValueError(f"{name} is {value!r}; allowed are texts")
        for name in ("batch", "workers", "attempts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed are whole numbers from 1")
        if not isinstance(self.seconds, (int, float)) or not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds!r}; allowed are numbers above 0")
        try:
            json.dumps(dict(self.options))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"options is {self.options!r:.80}; allowed is a mapping of JSON values"
            ) from error

    @property
    def identity(self) -> str:
        """What answers depend on."""
        asked = self.body([Pair("", "", "")], swapped=False)
        return json.dumps([self.url, self.batch, asked], sort_keys=True)

    def wins(
        self,
        pairs: Sequence[Pair],
        on_progress: Callable[[int], None] | None = None,
        draft: Draft | None = None,
    ) -> list[float | None]:
        """1 where ours wins in both orders, 0 where theirs does, 0.5 where the orders disagree.

        Args:
            pairs: to judge.
            on_progress: told how many pairs have been asked in both orders.
            draft: keeps every answer at once; what it has of the same pairs is not asked again.

        Returns:
            One number per pair; None where the judge gave no answer that can be read.

        Raises:
            ValueError: more than 5 % of the pairs have none: how many, and why the last; or the
                judge refuses every question.
        """
        batches = [pairs[i : i + self.batch] for i in range(0, len(pairs), self.batch)]
        questions = [(i, swapped) for i in range(len(batches)) for swapped in (False, True)]
        answers: dict[tuple[int, bool], list[bool] | None] = {
            (part["batch"], part["swapped"]): part["answer"]
            for part in (draft.parts() if draft is not None else ())
        }
        reasons: list[str] = []

        def ask(batch: int, swapped: bool) -> list[bool] | None:
            answer = self._ask(batches[batch], swapped, reasons)
            if draft is not None and answer is not None:
                draft.add({"batch": batch, "swapped": swapped, "answer": answer})
            return answer

        pool = ThreadPoolExecutor(self.workers)
        try:
            asked = {pool.submit(ask, *q): q for q in questions if q not in answers}
            for future in as_completed(asked):
                answers[asked[future]] = future.result()
                if on_progress is not None:
                    both = (i for i in range(len(batches)) if {(i, False), (i, True)} <= {*answers})
                    on_progress(sum(len(batches[i]) for i in both))
        finally:  # what was asked already may be paid for: its answers are kept
            pool.shutdown(cancel_futures=True)
        wins: list[float | None] = []
        for i, batch in enumerate(batches):
            plain, swapped = answers[i, False], answers[i, True]
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

    def body(self, batch: Sequence[Pair], swapped: bool) -> dict[str, Any]:
        """What is sent to ask about a batch."""
        goal, _ = WORDS[self.chat]
        ours = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": SYSTEM.format(goal=goal)},
                {"role": "user", "content": question(batch, swapped, self.chat)},
            ],
            "temperature": 0,
            "max_tokens": 16 * len(batch),
        }
        body = ours | dict(self.options)
        return {name: value for name, value in body.items() if value is not None}

    def _ask(self, batch: Sequence[Pair], swapped: bool, reasons: list[str]) -> list[bool] | None:
        """Whether (a) is preferred, for each example; None without a readable answer.

        Raises:
            ValueError: the judge refuses every question.
        """
        body = self.body(batch, swapped)
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(2.0**attempt, 30.0))
            try:
                text = self._post(body)
            except urllib.error.HTTPError as error:
                reasons.append(_reason(error))
                if error.code in REFUSALS:
                    raise ValueError(
                        f"the judge {self.model!r} at {self.url} refuses ({reasons[-1]}); allowed "
                        f"are a model that is there, and a key in {self.key_variable} if it "
                        "needs one"
                    ) from error
                if error.code < 500 and error.code not in AGAIN:
                    return None  # the same question would be refused again
                continue
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                reasons.append(f"{type(error).__name__}: {error}")
                continue
            found = choices(text)
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


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        said = " ".join(error.read(500).decode(errors="replace").split())
    except (OSError, HTTPException):  # it ended in the middle
        said = str(error.reason)
    return f"HTTP {error.code}: {said}"


def choices(text: str) -> list[bool]:
    """Whether (a) is preferred, by each line of an answer that says its choice and no more."""
    found = (_ANSWER.fullmatch(line) for line in text.splitlines())
    return [match[1].lower() == "a" for match in found if match]


def question(batch: Sequence[Pair], swapped: bool, chat: bool = False) -> str:
    """The text of one question; swapped, ours is Output (b)."""
    parts = [TASK.format(n=len(batch), what=WORDS[chat][1])]
    for i, (prompt, ours, theirs) in enumerate(batch, start=1):
        first, second = (theirs, ours) if swapped else (ours, theirs)
        parts.append(
            f"## Example {i}\n\n### Instruction {i}:\n{prompt}\n\n### Output (a) for example {i}:\n"
            f"{first}\n\n### Output (b) for example {i}:\n{second}"
        )
    parts.append(
        f"## Preferred Output for example 1-{len(batch)}:\n"
        f"Now give all the preferred outputs for the batch of {len(batch)} examples."
    )
    return "\n\n".join(parts)
