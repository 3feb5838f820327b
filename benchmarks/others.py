"""Unguided decoding by others: transformers, and gpt-fast and vLLM where they are installed.

Each function gives seconds of each token after the first, or says why it cannot.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from shapes import POLICY_SEED, SHAPE, Shape, prompt_tokens, random_llama
from step_clock import StepClock


class Timing(NamedTuple):
    """Seconds of each token, or None and the reason."""

    seconds: list[float] | None
    reason: str = ""


class Setting(NamedTuple):
    """What all of them decode: one prompt, sampled from the whole distribution."""

    device: str
    prompt: int
    steps: int
    shape: Shape = SHAPE
    temperature: float = 0.7


def time_transformers(device: str, batch: int, prompt: int, steps: int) -> float:
    """Seconds per token step of ``transformers.generate``, unguided, without its prefill."""
    model = random_llama(device, "sdpa")
    ids = torch.randint(0, SHAPE["vocab_size"], (batch, prompt), device=device)

    def run(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=count
            )
        return time.perf_counter() - start

    run(2)
    return statistics.median((run(steps + 1) - run(1)) / steps for _ in range(3))


def transformers_decoder(setting: Setting) -> Callable[[], Timing]:
    """``transformers.generate``, loaded."""
    model = random_llama(setting.device, "sdpa", shape=setting.shape)
    tokens = prompt_tokens(0, setting.prompt, setting.shape)
    ids = torch.tensor([tokens], device=setting.device)

    def decode() -> Timing:
        with torch.inference_mode(), StepClock(model) as clock:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=setting.temperature,
                top_k=0,
                max_new_tokens=setting.steps + 1,
            )
        return Timing(clock.seconds)

    return decode


def gpt_fast_decoder(setting: Setting, repository: str | None) -> Callable[[], Timing]:
    """gpt-fast from a clone of its repository, compiled as its own script does."""
    if repository is None:
        return lambda: Timing(None, "gpt-fast: no --gpt-fast-repo")
    sys.path.insert(0, repository)
    try:
        # Its generate module imports a tokenizer module with needs of its own, for texts only.
        stub = types.ModuleType("tokenizer")
        stub.get_tokenizer = None  # type: ignore[attr-defined]
        sys.modules.setdefault("tokenizer", stub)
        generate, model = (importlib.import_module(name) for name in ("generate", "model"))
    except ImportError as error:
        reason = f"gpt-fast: {error}"
        return lambda: Timing(None, reason)
    finally:
        sys.path.remove(repository)
    transformer = _gpt_fast_model(model, setting)
    generate.decode_one_token = torch.compile(
        generate.decode_one_token, mode="reduce-overhead", fullgraph=True
    )
    tokens = prompt_tokens(0, setting.prompt, setting.shape)
    ids = torch.tensor(tokens, dtype=torch.int, device=setting.device)

    def decode() -> Timing:
        times: list[float] = []

        def note(token: Any) -> None:
            token.item()  # waits for the device
            times.append(time.perf_counter())

        with torch.device(setting.device):
            generate.generate(
                transformer,
                ids,
                setting.steps + 1,
                batch_size=1,
                interactive=False,
                draft_model=None,
                callback=note,
                temperature=setting.temperature,
                top_k=None,
            )
        return Timing([b - a for a, b in pairwise(times)])

    decode()  # compiles
    return decode


def _gpt_fast_model(module: Any, setting: Setting) -> Any:
    """gpt-fast's model in our shape, with weights of its own: its speed is that of any."""
    shape = setting.shape
    arguments = module.ModelArgs(
        block_size=shape["max_position_embeddings"],
        vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_local_heads=shape["num_key_value_heads"],
        dim=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
    )
    torch.manual_seed(POLICY_SEED)
    model = module.Transformer(arguments)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return model.to(device=setting.device, dtype=torch.bfloat16).eval()


def vllm_decoder(setting: Setting) -> Callable[[], Timing]:
    """vLLM's offline engine on the same weights."""
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        reason = f"vLLM: {error}"
        return lambda: Timing(None, reason)
    with tempfile.TemporaryDirectory() as folder:
        random_llama("cpu", "sdpa", shape=setting.shape).save_pretrained(folder)
        engine = vllm.LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=setting.prompt + setting.steps + 8,
            enable_prefix_caching=True,  # the prompt is no part of the figure
        )
    tokens = prompt_tokens(0, setting.prompt, setting.shape)

    def run(count: int) -> float:
        sampling = vllm.SamplingParams(
            temperature=setting.temperature, max_tokens=count, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
        return time.perf_counter() - start

    run(2)
    # Its loop gives no times of tokens: every one takes the mean of its run.
    return lambda: Timing([(run(setting.steps + 1) - run(1)) / setting.steps] * setting.steps)
