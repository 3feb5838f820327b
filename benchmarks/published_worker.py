"""Runs the published ARGS and VAS code from clones of their repositories; see ``published.py``.

It runs in an environment of its own, with the versions that they were written for (transformers
4.36), so it imports neither fastguide nor the other benchmarks. Reads a request in JSON from each
line of its input and writes an answer to each:

    {"method": "args", "tokens": [...], "k": 10, "strength": 1.5, "temperature": 0.0, "steps": 64}
    {"tokens": [...], "seconds": [...], "versions": {...}}
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from step_clock import StepClock
from tokenizers import Tokenizer, models, pre_tokenizers

LIBRARIES = ("torch", "transformers", "trl")
PUBLISHED_VAS_K = 20
"""What ``VASTrainer.generate`` scores; it takes no other number."""


def clone(path: str, module: str) -> Any:
    """A module of a clone."""
    sys.path.insert(0, path)
    return importlib.import_module(module)


def number_tokenizer(vocabulary: int) -> Any:
    """Texts are token ids with spaces between: the published code wants a tokenizer."""
    unknown = "<unk>"  # its id is past the models' last and never occurs
    words = {str(i): i for i in range(vocabulary)} | {unknown: vocabulary}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, pad_token=unknown
    )


class Args:
    """``argsearch.ARGS``, as it is."""

    def __init__(self, folder: Path, repository: str, device: str, dtype: torch.dtype) -> None:
        policy = str(folder / "policy")
        number_tokenizer(
            json.loads((folder / "policy/config.json").read_text())["vocab_size"]
        ).save_pretrained(policy)
        published = clone(repository, "argsearch").ARGS
        self.search = published(policy, str(folder / "guide"), device, device, torch_dtype=dtype)
        self.policy = self.search.LLM

    def decode(self, request: dict[str, Any]) -> list[int]:
        """Prompt and new tokens."""
        output = self.search.generate(
            " ".join(map(str, request["tokens"])),
            weight=request["strength"],
            topk=request["k"],
            max_new_token=request["steps"],
            method="topk" if request["temperature"] else "greedy",
            temperature=request["temperature"],
        )
        return output[0].tolist()


class Vas:
    """``vas_trainer.VASTrainer.generate``.

    The value model is called with whole texts beside a cache of all but the last token. Its authors
    had a TRL of their own; released ones append the whole text to the cache once more, for wrong
    values at a cost that grows with every step. So only what the cache lacks is handed on: the
    reading of the code that is right, and by far the faster one. A request with "whole": true
    leaves the calls as they are.
    """

    def __init__(self, folder: Path, repository: str, device: str, dtype: torch.dtype) -> None:
        # Of TRL's releases those that give back a cache divide with fewer words than the published
        # configuration passes.
        divisions = importlib.import_module("trl.trainer.utils")
        exact_div = divisions.exact_div
        divisions.exact_div = lambda a, b, *words: exact_div(a, b, words[-1])
        published = clone(repository, "vas_trainer")
        self.whole = False

        def wrapped(name: str) -> Any:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder / name), torch_dtype=dtype
            )
            value = published.AutoModelForCausalLMWithValueHead.from_pretrained(model)
            return value.to(device).eval()  # its head stays in fp32, as TRL leaves it

        guide, policy = wrapped("guide"), wrapped("policy")
        weights = load_file(str(folder / "guide/model.safetensors"))
        with torch.no_grad():
            guide.v_head.summary.weight.copy_(weights["score.weight"])
            guide.v_head.summary.bias.zero_()  # a common shift, which eq. 4 takes out again
        tokenizer = number_tokenizer(policy.config.vocab_size)
        # The weights have the type that is asked for: autocast would only add conversions, of the
        # whole cache among them.
        config = published.VASConfig(mixed_precision=None)
        self.trainer = published.VASTrainer(config, guide, policy, tokenizer)
        self.trainer.model.register_forward_pre_hook(self._new_tokens, with_kwargs=True)
        self.policy = policy.pretrained_model

    def _new_tokens(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cached = kwargs.get("past_key_values")
        if cached is None or self.whole:
            return None
        return (args[0][:, cached[0][0].shape[2] :], *args[1:]), kwargs

    def decode(self, request: dict[str, Any]) -> list[int]:
        """Prompt and new tokens."""
        if request["k"] != PUBLISHED_VAS_K:
            raise ValueError(f"k is {request['k']}; the published VAS scores {PUBLISHED_VAS_K}")
        self.whole = request.get("whole", False)
        temperature = request["temperature"]
        sampling = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else {}
        output = self.trainer.generate(
            torch.tensor(request["tokens"], device=self.policy.device),
            vas_generation=True,
            # What samples divides by the temperature after the processor; here beta is not divided.
            beta=request["strength"] * (temperature or 1.0),
            max_new_tokens=request["steps"],
            **sampling,
        )
        return output[0].tolist()


def main() -> None:
    """Answer requests until there are no more."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="models written by published.py")
    parser.add_argument("--args-repo", metavar="FOLDER")
    parser.add_argument("--vas-repo", metavar="FOLDER")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # the published code prints
    makers = {"args": (Args, arguments.args_repo), "vas": (Vas, arguments.vas_repo)}
    loaded: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["method"]
        if name not in loaded:
            make, repository = makers[name]
            dtype = getattr(torch, arguments.dtype)
            loaded[name] = make(arguments.folder, repository, arguments.device, dtype)
        with StepClock(loaded[name].policy) as clock:
            output = loaded[name].decode(request)
        answer = {
            "tokens": output[len(request["tokens"]) :],
            "seconds": clock.seconds,
            "versions": {n: sys.modules[n].__version__ for n in LIBRARIES if n in sys.modules},
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
