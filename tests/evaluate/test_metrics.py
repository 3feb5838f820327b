"""Measures of texts, and intervals."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch
from scipy import stats
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from fastguide.assets import packaged
from fastguide.evaluate import Coherence, Estimate, diversity, matched, win_rate
from fastguide.evaluate.metrics import repetition, t95
from fastguide.evaluate.report import pooled


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
    assert found.ci95 == pytest.approx(
        12.706 * statistics.stdev([1.0, 3.0]) / math.sqrt(2), rel=1e-4
    )
    assert Estimate.of({5: [2.0, 4.0]}) == Estimate(3.0, None, 2)
    assert Estimate.of({}) == Estimate(None, None, 0)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 63, 64, 1000])
def test_quantiles_are_those_of_students_t(freedom: int) -> None:
    assert t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_runs_widen_a_pooled_interval_by_students_t() -> None:
    runs = [
        [{"point": "p", "failed": 0, "reward": {"mean": mean, "ci95": 0.3, "responses": 8}}]
        for mean in (1.0, 2.0, 6.0)
    ]
    (found,) = pooled(runs)
    between = stats.t.ppf(0.975, 2) * statistics.stdev([1.0, 2.0, 6.0]) / math.sqrt(3)
    assert found["reward"]["ci95"] == pytest.approx(math.hypot(0.3, between))
    assert (found["reward"]["mean"], found["reward"]["responses"]) == (3.0, 24)


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
