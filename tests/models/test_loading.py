"""Checkpoints: complete or refused, found or missed with one sentence, loaded without noise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging

from fastguide import Engine, RewardGuide, ValueGuide
from fastguide.models import locate as locate_module
from fastguide.models.loading import load_policy, load_tokenizer, load_weights, one_line
from fastguide.models.locate import holds, locate
from fastguide.models.value import ValueModel

SMALL = dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
DECODER = SMALL | dict(intermediate_size=64, num_key_value_heads=2, head_dim=12)
GPT2 = dict(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64)


def without(folder: Path, copy: Path, *names: str) -> Path:
    """A copy of a checkpoint whose weights lack the tensors with these words in their names."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    state = load_file(file)
    kept = {name: t for name, t in state.items() if not any(word in name for word in names)}
    assert len(kept) < len(state)
    save_file(kept, file, metadata={"format": "pt"})
    return copy


# -------------------------------------------------------------------------- missing weights


def test_a_policy_that_lacks_weights_is_refused(stories: str, tmp_path: Path) -> None:
    one = without(Path(stories), tmp_path / "one", "layers.2.mlp.up_proj")
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM has: .*layers\.2.*up_proj.* missing"):
        Engine(one)
    many = without(Path(stories), tmp_path / "many", "layers.2")
    with pytest.raises(ValueError, match=r"and 8 more missing"):
        Engine(many)


def test_a_bare_backbone_is_no_policy_and_a_policy_no_judge(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **DECODER, num_labels=1, pad_token_id=0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"'lm_head.weight' missing"):
        load_policy(tmp_path / "bare")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"'score.weight' missing"):
        load_weights(AutoModelForSequenceClassification, tmp_path / "policy")


def test_a_language_model_is_no_reward_guide(stories: str) -> None:
    with pytest.raises(ValueError, match=r"'score.weight' missing"):
        Engine(stories, guides={"r": RewardGuide(stories)})


def test_a_guides_backbone_must_be_complete(full_guide: str, tmp_path: Path) -> None:
    broken = without(Path(full_guide), tmp_path / "guide", "layers.1.self_attn.q_proj")
    with pytest.raises(ValueError, match="a LlamaModel has"):
        ValueModel.from_pretrained(broken)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", DECODER | dict(tie_word_embeddings=True)),
        ("llama", DECODER),
        ("gpt2", GPT2),
        ("opt", SMALL | dict(ffn_dim=64, word_embed_proj_dim=24, max_position_embeddings=64)),
        ("gpt_neox", SMALL | dict(intermediate_size=64)),
        ("gemma3_text", DECODER),
    ],
)
def test_heads_that_are_tied_or_not_asked_for_may_be_absent(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path)
    policy = load_policy(tmp_path).model
    for name, weight in made.state_dict().items():
        assert torch.equal(policy.state_dict()[name], weight), name
    load_weights(AutoModel, tmp_path)  # has no head, and needs none


# ------------------------------------------------------------------------------- whereabouts


def test_what_is_not_a_model_is_told_at_once(stories: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "model.safetensors"
    file.touch()
    for path, reason in (
        ("/nowhere", "no model at '/nowhere': there is no such folder"),
        ("./no/where", "no model at './no/where': there is no such folder"),
        (str(empty), f"no model at '{empty}': the file config.json is missing"),
        ("cheerful", "no model at 'cheerful': it is a guide"),
        (str(file), f"no model at '{file}': it is a file, allowed are folders and hub ids"),
    ):
        for load in (Engine, load_policy):
            with pytest.raises(ValueError) as caught:
                load(path)
            assert str(caught.value) == reason
    with pytest.raises(ValueError, match="no tokenizer at '/nowhere': there is no such folder"):
        load_tokenizer("/nowhere")
    for guide in (ValueGuide("/nowhere"), RewardGuide("/nowhere")):
        with pytest.raises(ValueError, match="at '/nowhere': there is no such folder"):
            Engine(stories, guides={"g": guide})
    with pytest.raises(ValueError, match=r"no guide at 'stories': .*guide_config\.json is missing"):
        ValueModel.from_pretrained("stories")


def test_folders_and_packaged_names(stories: str, tmp_path: Path) -> None:
    assert locate("stories") == locate(stories) == stories
    assert locate("cheerful", "guide_config.json", "guide").endswith("cheerful")
    assert holds(Path(stories), "config.json", "model")
    assert not holds(stories, "guide_config.json", "model")


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(url: str) -> None:
        asked.append(url)
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(locate_module, "get_hf_file_metadata", unreachable)
    with pytest.raises(ValueError) as caught:
        Engine("no-such-org/no-such-model")
    assert str(caught.value) == (
        "no model at 'no-such-org/no-such-model': there is no such folder, and the hub cannot be "
        "reached"
    )
    assert len(asked) == 1


def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from httpx2 import Request, Response
    from huggingface_hub import errors

    def answer(kind: Any) -> None:
        response = Response(404, request=Request("HEAD", "https://example.org"))

        def asked(*arguments: Any) -> None:
            if kind is not None:
                raise kind("answer", response=response)

        monkeypatch.setattr(locate_module, "get_hf_file_metadata", asked)

    monkeypatch.setattr(locate_module, "hf_hub_download", lambda *arguments: "file")
    answer(None)
    assert locate("org/model") == "org/model"
    answer(errors.RemoteEntryNotFoundError)
    assert not holds("org/model", "config.json", "model")
    answer(errors.HfHubHTTPError)  # a trouble of the hub's own: others try longer
    assert holds("org/model", "config.json", "model")
    answer(errors.RepositoryNotFoundError)
    with pytest.raises(ValueError, match="the hub has no such repository"):
        locate("org/model")
    answer(errors.GatedRepoError)
    with pytest.raises(ValueError, match="the hub's repository wants a token"):
        locate("org/model")


# ------------------------------------------------------------------------------------- noise


def test_reasons_are_whole_words_on_one_line() -> None:
    assert (
        one_line(OSError("Can't load it.\n\n  Try\tthis.")) == "OSError: Can't load it. Try this."
    )
    assert one_line(KeyError()) == "KeyError: no message"
    long = one_line(ValueError("words " * 100))
    assert len(long) < 320
    assert long.endswith("words …")


@pytest.mark.parametrize("switch", [logging.enable_progress_bar, logging.disable_progress_bar])
def test_loading_shows_no_bar_and_leaves_settings_alone(
    stories: str, capfd: pytest.CaptureFixture[str], switch: Callable[[], None]
) -> None:
    def settings() -> tuple[bool, bool]:
        return logging.is_progress_bar_enabled(), are_progress_bars_disabled()

    before = settings()
    try:
        switch()
        chosen = settings()
        Engine(stories, guides={"cheerful": ValueGuide("cheerful")})
        assert settings() == chosen
        assert "Loading weights" not in capfd.readouterr().err
    finally:
        (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()
