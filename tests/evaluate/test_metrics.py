"""Measures of texts, intervals, and the judge's protocol."""

from __future__ import annotations

import json
import math
import statistics
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from fastguide.assets import packaged
from fastguide.evaluate import Coherence, Estimate, Judge, Pair, diversity, matched, win_rate
from fastguide.evaluate.judge import question
from fastguide.evaluate.metrics import repetition


def test_repetition_by_hand() -> None:
    text = "a b a b a"  # bigrams ab ba ab ba; trigrams aba bab aba
    assert repetition(text, 2) == pytest.approx(0.5)
    assert repetition(text, 3) == pytest.approx(1 / 3)
    assert repetition(text, 4) == 0.0
    assert diversity(text) == pytest.approx(0.5 * 2 / 3)
    assert diversity("all words of this differ") == 1.0
    assert diversity("") == 1.0


def test_intervals_are_of_prompts() -> None:
    found = Estimate.of({0: [1.0, 1.0, 1.0], 1: [3.0], 2: []})
    assert (found.mean, found.responses) == (2.0, 4)
    assert found.ci95 == pytest.approx(1.96 * statistics.stdev([1.0, 3.0]) / math.sqrt(2))
    assert Estimate.of({5: [2.0, 4.0]}) == Estimate(3.0, None, 2)
    assert Estimate.of({}) == Estimate(None, None, 0)


def test_win_rates_count_all_pairs_and_ties_half() -> None:
    half = {0: [(0.5, 1.0), (0.5, 2.0)], 1: [(1.0, 0.0)], 9: [(1.0, 1.0)]}
    found = win_rate(half, {0: [(0.5, 1.0), (0.5, 0.0)], 1: [(1.0, 5.0)]})
    assert found.mean == pytest.approx(((0.5 + 1 + 1 + 1) / 4 + 0.0) / 2)
    likely = win_rate({0: [(0.9, 1.0), (0.1, 2.0)]}, {0: [(0.5, 1.0), (0.5, 2.0)]})
    assert likely.mean == pytest.approx(0.9 * (0.25 + 0.0) + 0.1 * (0.5 + 0.25))


def test_curves_are_read_between_their_points() -> None:
    assert matched([4.0, 0.0, 2.0], [8.0, 0.0, 2.0], at=3.0) == 5.0
    assert matched([0.0, 2.0], [0.0, 2.0], at=3.0) is None


def test_a_text_coheres_with_itself() -> None:
    coherence = Coherence("stories", pooling="mean", device="cpu")
    same, other = coherence(["Tom ran.", "Tom ran."], ["Tom ran.", "A cat sat on it."])
    assert same == pytest.approx(1.0, abs=1e-3)
    assert other < same
    with pytest.raises(ValueError, match="pooling is 'max'; allowed are pooler, cls, mean"):
        Coherence("stories", pooling="max")
    with pytest.raises(ValueError, match="pooling is 'pooler', but the encoder 'stories' has none"):
        Coherence("stories", pooling="pooler")


def test_encoders_are_pooled_as_they_were_trained(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=2048, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "sentences")
    BertForMaskedLM(config).save_pretrained(tmp_path / "words")
    for name in ("sentences", "words"):
        AutoTokenizer.from_pretrained(packaged("stories")).save_pretrained(tmp_path / name)
    texts = ["Tom ran."], ["A cat sat on it."]
    (default,), (pooler,), (first,) = (
        Coherence(tmp_path / "sentences", pooling=p, device="cpu")(*texts)
        for p in (None, "pooler", "cls")
    )
    assert default == pooler != first
    model = BertModel.from_pretrained(tmp_path / "sentences").eval()
    tokenizer = AutoTokenizer.from_pretrained(packaged("stories"))
    vectors = [model(**tokenizer(text[0], return_tensors="pt")).pooler_output[0] for text in texts]
    assert pooler == pytest.approx(torch.cosine_similarity(*vectors, dim=0).item(), abs=1e-5)
    words = Coherence(tmp_path / "words", device="cpu")  # its weights have no pooler
    assert -1 <= words(*texts)[0] <= 1


# ------------------------------------------------------------------------------------ judge


@pytest.fixture
def server() -> Iterator[Any]:
    """An API whose judge is a function of the question."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            httpd.asked.append((self.path, self.headers.get("Authorization"), body))
            text = httpd.answer(body["messages"][-1]["content"])
            if text is None:
                self.send_error(503)
                return
            data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    httpd: Any = HTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.answer = [], lambda text: ""
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def answers(text: str, prefer: Any) -> str:
    """What a judge says that prefers (a) where ``prefer(first, second)``."""
    lines = []
    for i in range(1, text.count("### Instruction") + 1):
        first = text.split(f"### Output (a) for example {i}:\n")[1].split("\n\n")[0]
        second = text.split(f"### Output (b) for example {i}:\n")[1].split("\n\n")[0]
        lines.append("Output (a)" if prefer(first, second) else "Output (b)")
    return "\n".join(lines)


PAIRS = [Pair(f"Q{i}", ours, theirs) for i, (ours, theirs) in enumerate([("longer", "x")] * 7)]


def test_both_orders_are_asked_and_count(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    server.answer = lambda text: answers(text, lambda a, b: len(a) > len(b))
    judge = Judge(server.url, "m", key_variable="MY_KEY")
    told: list[int] = []
    assert judge.wins(PAIRS, told.append) == [1.0] * 7
    assert told == [1, 2, 3, 4]  # two batches, two orders
    assert {path for path, _, _ in server.asked} == {"/v1/chat/completions"}
    assert {key for _, key, _ in server.asked} == {"Bearer secret"}
    swapped = [Pair(p.prompt, p.theirs, p.ours) for p in PAIRS]
    assert judge.wins(swapped) == [0.0] * 7


def test_a_judge_that_prefers_a_place_gives_ties(server: Any) -> None:
    server.answer = lambda text: answers(text, lambda a, b: True)
    assert Judge(server.url, "m", batch=3).wins(PAIRS) == [0.5] * 7


def test_what_is_not_answered_is_not_counted(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.answer = lambda text: "I would rather not say." if "Q6" in text else None
    judge = Judge(server.url, "m", attempts=2)
    with pytest.raises(ValueError, match=r"no answer on 7 of 7 pairs .*, last: an answer with 0"):
        judge.wins(PAIRS)
    assert len(server.asked) == 8
    server.answer = lambda text: None
    with pytest.raises(ValueError, match="last: HTTP 503"):
        judge.wins(PAIRS)
    many = [Pair(f"Q{i}", "longer", "x") for i in range(40)]
    rare = Judge(server.url, "m", batch=1, attempts=1)
    server.answer = lambda text: "?" if "Q6\n" in text else answers(text, lambda a, b: a > b)
    found = rare.wins(many)
    assert [i for i, win in enumerate(found) if win is None] == [6]
    with pytest.raises(ValueError, match="url is 'localhost'"):
        Judge("localhost", "m")


def test_a_question_shows_every_pair_in_its_order() -> None:
    text = question([Pair("Why?", "ours", "theirs")], swapped=True)
    assert text.index("theirs") < text.index("ours", text.index("theirs") + 6)
    assert "### Instruction 1:\nWhy?" in text
