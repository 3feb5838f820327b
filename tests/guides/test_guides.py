"""Every kind of guide gives each candidate the score that its model gives the whole text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from fastguide import ARGS, VAS, Engine, FunctionGuide, RewardGuide, SamplingParams, ValueGuide
from fastguide.guides import LoadContext
from fastguide.models.value import ValueModel

CONTEXT = 'Once upon a time, there was a little girl. "'
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(stories: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def reward_folder(stories: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A one-label classifier on the packaged model's weights, with a random head."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("reward")
    model = AutoModelForSequenceClassification.from_pretrained(stories, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    return str(folder)


def context(tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32) -> LoadContext:
    return LoadContext(tokenizer, CPU, dtype)


@pytest.mark.parametrize("which", ["lora_guide", "full_guide"])
def test_value_guides(
    which: str, request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = request.getfixturevalue(which)
    prompt = tokenizer(CONTEXT)["input_ids"]
    candidates = [5, 0, 99, 1200]  # 0 is end of text, padding and beginning at once
    scorer = ValueGuide(folder).load(context(tokenizer))
    (found,) = scorer.score([scorer.open(prompt)], [candidates])
    model = ValueModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([[*prompt, c] for c in candidates]))[:, -1]
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.std() > 1e-3


def test_reward_guides_score_each_candidates_own_row(
    reward_folder: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Also where the candidate is the padding token, at which transformers pools elsewhere."""
    prompt = tokenizer(CONTEXT)["input_ids"]
    candidates = [5, 0, 99, 1200]
    scorer = RewardGuide(reward_folder).load(context(tokenizer))
    (found,) = scorer.score([scorer.open(prompt)], [candidates])
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32)
    rows = torch.tensor([[*prompt, c] for c in candidates])
    with torch.inference_mode():
        expected = model.score(model.model(rows).last_hidden_state[:, -1])[:, 0]
        pooled = model(rows).logits[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)
    ordinary = [0, 2, 3]
    assert torch.allclose(found[ordinary], pooled[ordinary], atol=1e-5)
    assert not torch.allclose(found[1], pooled[1], atol=1e-3)  # the trap is real here


def test_reward_scores_are_not_rounded_to_the_models_dtype(
    reward_folder: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    scorer = RewardGuide(reward_folder).load(context(tokenizer, torch.bfloat16))
    (found,) = scorer.score([scorer.open([5, 6])], [list(range(40))])
    assert (found != found.bfloat16().float()).any()


def test_value_models_on_projected_hidden_states(tmp_path: Path) -> None:
    """OPT's last hidden state has the width of its embeddings, not of its layers."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=2048,
        hidden_size=32,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    assert ValueModel.create(tmp_path, lora_rank=2)(torch.tensor([[5, 6, 7]])).shape == (1, 3)


def test_a_full_guide_of_another_tokenizer_of_the_same_size_is_refused(
    stories: str, full_guide: str, tmp_path: Path
) -> None:
    """The guide's own folder holds no tokenizer: its base model's counts."""
    import json
    import shutil

    base, guide = tmp_path / "base", tmp_path / "guide"
    shutil.copytree(stories, base)
    shutil.copytree(full_guide, guide)
    file = base / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.__getitem__)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(data), encoding="utf-8")
    settings = guide / "guide_config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(config | {"base_model": str(base)}), encoding="utf-8")
    with pytest.raises(ValueError, match="2 of the policy's differ"):
        Engine(stories, guides={"g": ValueGuide(guide)})


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mistral"])
def test_reward_guides_of_other_architectures(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    sizes: dict[str, dict] = {
        "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=64),
        "opt": dict(hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                    word_embed_proj_dim=16, max_position_embeddings=64),
        "mistral": dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, sliding_window=4),
    }  # fmt: skip
    tokens = dict(vocab_size=2048, pad_token_id=0, bos_token_id=0, eos_token_id=0, num_labels=1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes[kind], **tokens)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    scorer = RewardGuide(tmp_path).load(context(tokenizer))
    prompt, candidates = tokenizer(CONTEXT)["input_ids"], [5, 99]
    (found,) = scorer.score([scorer.open(prompt)], [candidates])
    with torch.inference_mode():
        expected = model(torch.tensor([[*prompt, c] for c in candidates])).logits[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_classifiers_that_cannot_guide_are_refused(
    stories: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    AutoModelForSequenceClassification.from_pretrained(stories, num_labels=3).save_pretrained(
        tmp_path / "three"
    )
    with pytest.raises(ValueError, match="has 3 labels; allowed is 1"):
        RewardGuide(tmp_path / "three").load(context(tokenizer))
    config = AutoConfig.for_model(
        "bert", vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=1,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="Bert"):
        RewardGuide(tmp_path / "bert").load(context(tokenizer))


def test_function_guides(stories: str) -> None:
    seen: list[str] = []

    def count_m(text: str) -> float:
        seen.append(text)
        return text.count("m")

    def lengths(rows: list[list[int]]) -> list[float]:
        return [float(len(row)) for row in rows]

    engine = Engine(
        stories,
        guides={
            "m": FunctionGuide(count_m),
            "n": FunctionGuide(lengths, on="tokens", batched=True),
        },
        dtype="float32",
    )
    sampling = SamplingParams(temperature=0.7, max_tokens=20, seed=3, n=2)
    plain = engine.generate("Once upon a time", sampling=sampling)
    guided = engine.generate("Once upon a time", VAS(5.0), {"m": 1.0}, sampling)
    assert all(text.startswith("Once upon a time") for text in seen)

    def count(outputs: list) -> int:
        return sum(c.text.count("m") for c in outputs)

    assert count(guided) > count(plain) + 5
    constant = engine.generate("Once upon a time", VAS(5.0), {"n": 1.0}, sampling)
    assert [c.token_ids for c in constant] == [c.token_ids for c in plain]


def test_args_with_a_reward_guide(stories: str, reward_folder: str) -> None:
    engine = Engine(stories, guides={"r": RewardGuide(reward_folder)}, dtype="float32")
    sampling = SamplingParams(temperature=0, max_tokens=12)
    low = engine.generate("One day", ARGS(0.0), sampling=sampling)[0]
    high = engine.generate("One day", ARGS(30.0), sampling=sampling)[0]
    assert low.token_ids == engine.generate("One day", sampling=sampling)[0].token_ids
    assert high.mean_score is not None
    assert low.mean_score is not None
    assert high.mean_score > low.mean_score


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(stories: str, lora_guide: str, dtype: str) -> None:
    engine = Engine(stories, guides={"g": ValueGuide(lora_guide)}, dtype=dtype)
    assert str(engine.runner.policy.model.dtype) == f"torch.{dtype}"
    out = engine.generate("One day", VAS(2.0), sampling=SamplingParams(max_tokens=8, seed=0))[0]
    assert out.finish_reason == "length"
    keys, _ = engine.runner.scorers["g"].decoder.pool.layer(0)  # type: ignore[attr-defined]
    assert str(keys.dtype) == f"torch.{dtype}"


def test_guides_compute_in_the_policys_dtype(stories: str, full_guide: str) -> None:
    """Trainers save float32, in which a pass takes more than twice as long."""
    saved = ValueModel.from_pretrained(full_guide).backbone
    assert next(saved.parameters()).dtype == torch.float32
    engine = Engine(stories, guides={"g": ValueGuide(full_guide)})
    scorer = engine.runner.scorers["g"]
    assert engine.runner.policy.model.dtype == torch.bfloat16
    assert scorer.decoder.model.dtype == torch.bfloat16  # type: ignore[attr-defined]
