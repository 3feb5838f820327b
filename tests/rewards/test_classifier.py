"""Sequence classifiers as rewards: encoders and decoders, in batches as alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fastguide.assets import packaged
from fastguide.rewards import ClassifierReward, Sample, load_reward, spec_of

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
CONTEXT = 40
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (BertConfig, BertForSequenceClassification, {}),
    "roberta": (
        RobertaConfig,
        RobertaForSequenceClassification,
        {"max_position_embeddings": CONTEXT + 2, "pad_token_id": 1},
    ),
    "deberta": (
        DebertaV2Config,
        DebertaV2ForSequenceClassification,
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 40},
    ),
    "llama": (LlamaConfig, LlamaForSequenceClassification, {}),
}
SAMPLES = [
    Sample("Tom had a dog.", " It was red.", 5),
    Sample("Lily", " saw a big cat and they all went home to sleep.", 12),
    Sample("One day", "", 0),
]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("classifiers")

    def make(kind: str, labels: int = 1, **names: Any) -> Path:
        target = folder / f"{kind}-{labels}"
        if not target.is_dir():
            config_class, model_class, more = KINDS[kind]
            torch.manual_seed(0)
            config = config_class(
                **({"max_position_embeddings": CONTEXT, "pad_token_id": 0} | SIZES | more),
                num_labels=labels,
                initializer_range=0.3,
                **names,
            )
            model_class(config).save_pretrained(target)
            tokenizer = AutoTokenizer.from_pretrained(packaged("stories"))
            tokenizer.model_max_length = 10**9
            if kind == "roberta":
                tokenizer.pad_token_id = 1
            tokenizer.save_pretrained(target)
        return target

    return make


@pytest.mark.parametrize("on", ["text", "pair", "response"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_judged_as_its_samples_alone(classifiers: Any, kind: str, on: Any) -> None:
    reward = ClassifierReward(classifiers(kind), on=on, dtype="float32", device="cpu")
    together = reward(SAMPLES)
    alone = [reward([sample])[0] for sample in SAMPLES]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == len(SAMPLES)
    one_by_one = ClassifierReward(classifiers(kind), on=on, batch_size=1, device="cpu")
    assert one_by_one(SAMPLES) == pytest.approx(alone, abs=1e-5)


def test_a_response_is_judged_with_its_prompt_or_without(classifiers: Any) -> None:
    path = classifiers("bert")
    others = [sample._replace(prompt="Sam") for sample in SAMPLES]
    assert load_reward(f"classifier:{path}")(SAMPLES) != load_reward(f"classifier:{path}")(others)
    alone = load_reward(f"classifier:{path}?on=response")
    assert alone(SAMPLES) == alone(others)
    assert alone.name == f"classifier:{path}?on=response"


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_lose_their_beginning(classifiers: Any, kind: str) -> None:
    reward = ClassifierReward(classifiers(kind), device="cpu")
    end = " They went home." * 40
    one, other = (reward([Sample(prompt, end, 99)])[0] for prompt in ("Tom ran.", "A cat sat."))
    assert one == pytest.approx(other, abs=1e-6)


def test_a_name_needs_no_weights(classifiers: Any, tmp_path: Path) -> None:
    """But mistakes in it are told."""
    path = shutil.copytree(classifiers("bert"), tmp_path / "bare")
    specs = [f"0.5*classifier:{path}?on=response", "brevity"]
    whole = load_reward(specs, device="cpu")
    (path / "model.safetensors").unlink()
    named = load_reward(specs, weights=False)
    assert (named.name, spec_of(named)) == (whole.name, spec_of(whole))
    assert named.per_token == whole.per_token == 0.0
    with pytest.raises(ValueError, match="cannot load model weights"):
        load_reward(specs)
    for wrong, said in (
        ("?on=all", "on is 'all'"),
        ("?label=x", "label is 'x'"),
        ("x", "no model"),
    ):
        with pytest.raises(ValueError, match=said):
            load_reward(f"classifier:{path}{wrong}", weights=False)


def test_one_of_several_labels(classifiers: Any) -> None:
    names = {
        "id2label": {0: "sad", 1: "glad", 2: "calm"},
        "label2id": {"sad": 0, "glad": 1, "calm": 2},
    }
    path = classifiers("bert", 3, **names)
    found = [
        load_reward(f"classifier:{path}?label={name}")(SAMPLES) for name in ("sad", "1", "calm")
    ]
    for numbers in zip(*found, strict=True):
        assert sum(torch.tensor(numbers).exp()) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match=r"label is None; the classifier .* has sad, glad, calm"):
        load_reward(f"classifier:{path}")
    with pytest.raises(ValueError, match="label is 'joy'"):
        load_reward(f"classifier:{path}?label=joy")


def test_wrong_options_are_named(classifiers: Any, tmp_path: Path) -> None:
    path = classifiers("bert")
    with pytest.raises(ValueError, match="on is 'all'; allowed are text, pair, response, chat"):
        load_reward(f"classifier:{path}?on=all")
    with pytest.raises(ValueError, match="has the option 'lable'; allowed are on, label"):
        load_reward(f"classifier:{path}?lable=x")
    with pytest.raises(ValueError, match="has one logit"):
        load_reward(f"classifier:{path}?label=sad")
    with pytest.raises(ValueError, match="no model at"):
        load_reward(f"classifier:{tmp_path / 'none'}")
    # A language model has no head that judges.
    with pytest.raises(ValueError, match=r"are not all that a .* has"):
        load_reward(f"classifier:{packaged('stories')}")


def test_chats_are_judged_in_their_template(classifiers: Any, tmp_path: Path) -> None:
    path = classifiers("llama")
    with pytest.raises(ValueError, match=r"on is 'chat', but the tokenizer of .* has no template"):
        load_reward(f"classifier:{path}?on=chat")
    shutil.copytree(path, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = load_reward(f"classifier:{tmp_path / 'chat'}?on=chat", device="cpu")
    plain = load_reward(f"classifier:{path}?on=response", device="cpu")
    assert chat([Sample("Hi", "No", 1)]) == plain([Sample("", "<user>Hi<assistant>No", 1)])
