"""Incremental decoding and stop strings, on the packaged tokenizer and on random texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastguide import Engine, SamplingParams
from fastguide.assets import packaged
from fastguide.engine.text import TextStream, as_prompts, encode


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(packaged("stories"))


def feed(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, stop: tuple[str, ...]
) -> TextStream:
    stream = TextStream(tokenizer, tokenizer(prompt)["input_ids"], stop)
    pieces = ""
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if stream.add(token):
            break
        pieces += stream.take()
    stream.finish()
    pieces += stream.take(final=True)
    assert pieces == stream.text  # what was streamed never had to be taken back
    return stream


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_any_text_streams_exactly_and_ends_at_the_first_stop(text: str, stop: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packaged("stories"))
    text = text.replace("<|", "")
    stream = feed(tokenizer, "Once", text, tuple(stop))
    found = [i for i in (text.find(s) for s in stop) if i >= 0]
    assert stream.stopped == bool(found)
    assert stream.text == (text[: min(found)] if found else text)


def test_a_stop_string_across_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = feed(tokenizer, "One day", " a dog ran to the big park.", ("the big",))
    assert stream.text == " a dog ran to "


def test_characters_of_several_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert feed(tokenizer, "One", " naïve 日本 🙂 ok", ()).text == " naïve 日本 🙂 ok"


def test_the_engine_keeps_the_first_space(stories: str) -> None:
    engine = Engine(stories, guides={})
    out = engine.generate("Once upon a", sampling=SamplingParams(temperature=0, max_tokens=3))[0]
    assert out.text.startswith(" time")


def test_prompt_forms(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode(tokenizer, "One day") == tokenizer("One day")["input_ids"]
    assert encode(tokenizer, [0, 5, 9]) == [0, 5, 9]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.decode(encode(tokenizer, chat), skip_special_tokens=True) == "user: hi\n"
    assert as_prompts("One") == ["One"]
    assert as_prompts([1, 2]) == [[1, 2]]
    assert as_prompts(chat) == [chat]
    assert as_prompts([chat, "One", [3]]) == [chat, "One", [3]]


def test_arrays_and_tensors_are_token_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    for one in (
        np.array([5, 9]),
        torch.tensor([5, 9]),
        [np.int32(5), np.int64(9)],
        range(5, 10, 4),
    ):
        (prompt,) = as_prompts(one)
        assert encode(tokenizer, prompt) == [5, 9]
        assert all(type(token) is int for token in encode(tokenizer, one))
    several = [torch.tensor([5]), np.array([9]), "One"]
    assert as_prompts(several) == [[5], [9], "One"]
    assert as_prompts(np.array([[5, 6], [8, 9]])) == [[5, 6], [8, 9]]
    with pytest.raises(ValueError, match=r"the prompt is \[0.5\]; allowed are"):
        encode(tokenizer, np.array([0.5]))


def test_ends(stories: str) -> None:
    engine = Engine(stories, guides={})
    base = SamplingParams(temperature=0, max_tokens=30)
    tokens = engine.generate("One day", sampling=base)[0].token_ids
    stopped = engine.generate(
        "One day", sampling=SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[tokens[4]])
    )[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == tokens[: tokens.index(tokens[4]) + 1]
    # The model's own end of text ends a story, and is not part of the text.
    long = engine.generate("One day", sampling=SamplingParams(temperature=0, max_tokens=600))[0]
    assert long.finish_reason == "stop"
    assert long.token_ids[-1] == engine.tokenizer.eos_token_id
    assert "<|endoftext|>" not in long.text
    on = SamplingParams(temperature=0, max_tokens=len(long.token_ids) + 2, ignore_eos=True)
    assert engine.generate("One day", sampling=on)[0].finish_reason == "length"
    full = engine.generate(
        [[5] * 1020], sampling=SamplingParams(max_tokens=50, seed=0, ignore_eos=True)
    )
    assert full[0].finish_reason == "length"
    assert len(full[0].token_ids) == 4  # the context ends there
