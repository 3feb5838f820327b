"""The judge's protocol, against a server that speaks it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from fastguide.evaluate import Judge, Pair, Runner, read_study
from fastguide.evaluate.judge import choices, question
from fastguide.files import Draft


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastguide.evaluate.judge.time.sleep", lambda seconds: None)


def answers(text: str, prefer: Any) -> str:
    """What a judge says that prefers (a) where ``prefer(first, second)``."""
    lines = []
    for i in range(1, text.count("### Instruction") + 1):
        first = text.split(f"### Output (a) for example {i}:\n")[1].split("\n\n")[0]
        second = text.split(f"### Output (b) for example {i}:\n")[1].split("\n\n")[0]
        lines.append("Output (a)" if prefer(first, second) else "Output (b)")
    return "\n".join(lines)


def longer(text: str) -> str:
    return answers(text, lambda a, b: len(a) > len(b))


PAIRS = [Pair(f"Q{i}", "longer", "x") for i in range(7)]


def test_both_orders_are_asked_and_count(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    server.answer = longer
    judge = Judge(server.url, "m", key_variable="MY_KEY", workers=1)
    told: list[int] = []
    assert judge.wins(PAIRS, told.append) == [1.0] * 7
    assert told == [0, 5, 5, 7]  # pairs asked in both orders: of batches of 5 and 2
    assert {path for path, _, _ in server.asked} == {"/v1/chat/completions"}
    assert {key for _, key, _ in server.asked} == {"Bearer secret"}
    bodies = [body for _, _, body in server.asked]
    assert [body["max_tokens"] for body in bodies] == [80, 80, 32, 32]
    assert {body["temperature"] for body in bodies} == {0}
    swapped = [Pair(p.prompt, p.theirs, p.ours) for p in PAIRS]
    assert judge.wins(swapped) == [0.0] * 7


def test_a_judge_that_prefers_a_place_gives_ties(server: Any) -> None:
    server.answer = lambda text: answers(text, lambda a, b: True)
    assert Judge(server.url, "m", batch=3).wins(PAIRS) == [0.5] * 7


def test_options_take_the_place_of_what_is_sent(server: Any) -> None:
    server.answer = longer
    options = {"temperature": None, "max_tokens": None, "max_completion_tokens": 900}
    judge = Judge(server.url, "m", options=options)
    assert judge.wins(PAIRS) == [1.0] * 7
    body = server.asked[0][2]
    assert set(body) == {"model", "messages", "max_completion_tokens"}
    assert body["max_completion_tokens"] == 900
    assert judge.identity != Judge(server.url, "m").identity
    assert judge.identity == Judge(server.url, "m", options=options, workers=1).identity


SERVER_FAULTS = [
    (503, "busy"),
    (200, '{"choices": [{"message": {"content": "Output [cut off]'),
    (200, "<html>"),
    (200, "[1]"),
    (200, "{}"),
    (200, '{"choices": null}'),
    (200, '{"choices": [{"message": null}]}'),
    "I would rather not say.",
    "Output answers follow.\nOutput better one.\n" * 5,
]


@pytest.mark.parametrize("fault", SERVER_FAULTS)
def test_a_question_without_an_answer_is_asked_again(server: Any, fault: Any) -> None:
    once = iter([fault])
    server.answer = lambda text: next(once, None) or longer(text)
    judge = Judge(server.url, "m", attempts=2, workers=1)
    assert judge.wins(PAIRS) == [1.0] * 7
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((503, "busy"), "last: HTTP 503: busy"),
        ((200, "{}"), "last: KeyError: 'choices'"),
        ((200, '{"choices": [{"mess[cut off]'), "last: IncompleteRead"),
        ((200, '{"choices": null}'), "last: TypeError"),
        ("I would rather not say.", "last: an answer with 0 choices for"),
    ],
)
def test_more_than_a_few_failures_stop(server: Any, fault: Any, said: str) -> None:
    server.answer = lambda text: fault
    with pytest.raises(ValueError, match=r"no answer on 7 of 7 pairs \(allowed are 5") as error:
        Judge(server.url, "m", attempts=2).wins(PAIRS)
    assert said in str(error.value)
    assert len(server.asked) == 8


def test_a_few_failures_are_not_counted(server: Any) -> None:
    many = [Pair(f"Q{i}", "longer", "x") for i in range(40)]
    rare = Judge(server.url, "m", batch=1, attempts=1)
    server.answer = lambda text: "?" if "Q6\n" in text else longer(text)
    found = rare.wins(many)
    assert [i for i, win in enumerate(found) if win is None] == [6]
    assert set(found) == {None, 1.0}


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_judge_that_refuses_is_asked_once(server: Any, code: int) -> None:
    server.answer = lambda text: (code, "no\nsuch thing")
    judge = Judge(server.url, "m", workers=1, key_variable="MY_KEY")
    said = rf"the judge 'm' at http.* refuses \(HTTP {code}: no such thing\); .* key in MY_KEY"
    with pytest.raises(ValueError, match=said):
        judge.wins(PAIRS * 10)
    assert len(server.asked) < 14  # of 28; some may be on their way


def test_what_the_api_does_not_take_is_not_sent_again(server: Any) -> None:
    server.answer = lambda text: (400, "temperature must be 1")
    with pytest.raises(ValueError, match="last: HTTP 400: temperature must be 1"):
        Judge(server.url, "m").wins(PAIRS)
    assert len(server.asked) == 4


def test_answers_are_kept_at_once(server: Any, tmp_path: Path) -> None:
    """Whoever is stopped loses none, asks none twice, and has the same wins in the end."""
    served: list[str] = []

    def breaks(text: str) -> Any:
        served.append(text)
        return (403, "no money left") if len(served) > 3 else mixed(text)

    def mixed(text: str) -> str:
        return answers(text, lambda a, b: sum(map(ord, a)) > sum(map(ord, b)))

    pairs = [Pair(f"Q{i}", f"ours {i % 3}", f"theirs {i % 2}" * (i % 4)) for i in range(13)]
    server.answer = mixed
    judge = Judge(server.url, "m", workers=1)
    whole = judge.wins(pairs)
    assert len(set(whole)) > 1
    draft = Draft(tmp_path / "answers.draft.jsonl")
    server.answer = breaks
    with pytest.raises(ValueError, match="no money left"):
        judge.wins(pairs, draft=draft)
    assert len(list(draft.parts())) == 3
    server.asked.clear()
    server.answer = mixed
    assert judge.wins(pairs, draft=draft) == whole
    assert len(server.asked) == 3
    texts = [body["messages"][-1]["content"] for _, _, body in server.asked]
    assert not set(texts) & set(served[:3])
    server.asked.clear()
    assert judge.wins(pairs, draft=draft) == whole
    assert server.asked == []


def test_answers_that_are_on_their_way_are_kept(server: Any, tmp_path: Path) -> None:
    """An interrupt waits for what was asked, and asks no more."""
    second, interrupted = threading.Event(), threading.Event()

    def held(text: str) -> str:
        if len(server.asked) == 1:
            second.wait(60)
        else:
            second.set()
            interrupted.wait(60)
        return longer(text)

    def interrupt(done: int) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    server.answer = held
    draft = Draft(tmp_path / "answers.draft.jsonl")
    with pytest.raises(KeyboardInterrupt):
        Judge(server.url, "m", workers=2).wins(PAIRS[:5] * 8, interrupt, draft)
    kept = len(list(draft.parts()))
    assert 2 <= kept == len(server.asked) < 16


def test_a_judge_is_checked() -> None:
    for url in ("localhost", 5):
        with pytest.raises(ValueError, match=f"url is {url!r}; allowed are http"):
            Judge(url, "m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds is 0; allowed are numbers above 0"):
        Judge("http://x", "m", seconds=0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Output (a)\nOutput (b)", [True, False]),
        ("1. Output (b)\n2. **Output (a)**", [False, True]),
        ("Example 1: output (a).", [True]),
        ("Output answers: see below.\nOutput (b)", [False]),
        ("The output better than the others is Output (a)", []),
        ("### Which is best for example 2, Output (a) or Output (b)?:\nOutput (b)", [False]),
        ("Output (a) because it is better", []),
    ],
)
def test_only_lines_that_are_a_choice_count(text: str, found: list[bool]) -> None:
    assert choices(text) == found


def test_a_question_shows_every_pair_in_its_order() -> None:
    text = question([Pair("Why?", "ours", "theirs")], swapped=True)
    assert text.index("theirs") < text.index("ours", text.index("theirs") + 6)
    assert "### Instruction 1:\nWhy?" in text
    assert "1. An Instruction we give to the AI system" in text
    chat = question([Pair("Why?", "ours", "theirs")], swapped=False, chat=True)
    assert '1. A beginning of a conversation between an AI system ("Assistant") and a user' in chat


# ------------------------------------------------------------------------------- in a study


def test_a_study_asks_its_judge(study: Path, server: Any, tmp_path: Path) -> None:
    study.write_text(
        study.read_text()
        .replace("  - {name: BoN, rule: none, best_of: [1, 3], sampling: {n: 4}}\n", "")
        .replace("[Once upon a time, Tom had a red ball.]", json.dumps(PROMPTS))
        .replace(
            "dtype: float32",
            f"dtype: float32\njudge: {{url: '{server.url}', model: m, workers: 1}}",
        )
    )
    told: list[tuple[str, int, int]] = []
    runner = Runner(read_study(study), tmp_path / "out", lambda *what: told.append(what))

    def broken(text: str) -> Any:
        return (401, "no key") if len(server.asked) > 3 else longer(text)

    server.answer = broken
    with pytest.raises(ValueError, match="HTTP 401: no key"):
        runner.run()
    server.asked.clear()
    assert len(list((tmp_path / "out").glob("judged-*.draft.jsonl"))) == 1
    server.answer = longer
    plain, zero, guided = runner.run()
    # 6 pairs of two points are 4 questions each; 3 had their answer before.
    assert len(server.asked) == 1 + 4
    assert not list((tmp_path / "out").glob("*.draft.jsonl"))
    assert "judged" not in plain
    # At beta 0 the responses are the baseline's: a judge that says (b) of two equals gives ties.
    assert zero["judged"] == {"mean": 0.5, "ci95": 0.0, "responses": 6}
    ours, theirs = (
        {r["prompt"]: r["text"] for r in runner.responses(p) if r["sample"] == 0}
        for p in (runner.study.points[2], runner.study.points[0])
    )
    won = [
        (len(ours[p]) > len(theirs[p])) + 0.5 * (len(ours[p]) == len(theirs[p])) for p in range(6)
    ]
    assert guided["judged"]["mean"] == pytest.approx(sum(won) / 6)
    judged = [(done, of) for what, done, of in told if what == "VAS beta=4, judged"]
    assert judged == [(0, 6), (5, 6), (5, 6), (6, 6)]
    server.asked.clear()
    assert runner.run()[2]["judged"] == guided["judged"]
    assert server.asked == []


PROMPTS = ["Once", "Tom", "Lily had", "A cat", "One day", "The sun"]
