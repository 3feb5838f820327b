"""The published ARGS and VAS code, timed from clones of their repositories.

Nothing of it is part of fastguide. It needs versions of its time, so it runs in an environment of
its own (``docs/baselines.md`` says how to make one), as ``published_worker.py``, on the weights
that fastguide has.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from honest import Method
from safetensors.torch import save_file
from shapes import GUIDE_SEED, POLICY_SEED, SHAPE, Shape, random_head, random_llama

WORKER = Path(__file__).with_name("published_worker.py")


class Source(NamedTuple):
    """Where the published code is; None where it is not."""

    python: str
    """With transformers 4.36."""
    args: str | None = None
    vas: str | None = None


class Published:
    """A process that decodes with the published code, and the models that it reads.

    with Published(source, "cpu", torch.bfloat16) as published:
        tokens, seconds = published.decode(Method("args", 10, 1.5), prompt, 64)
    """

    def __init__(
        self, source: Source, device: str, dtype: torch.dtype, shape: Shape = SHAPE
    ) -> None:
        self.source = source
        self.device, self.dtype, self.shape = device, dtype, shape
        self.versions: dict[str, str] = {}
        """Of the libraries, and the commits of the clones that have answered."""

    def __enter__(self) -> Published:
        self.folder = tempfile.TemporaryDirectory(prefix="published-")
        write_models(Path(self.folder.name), self.dtype, self.shape)
        command = [self.source.python, str(WORKER), self.folder.name, "--device", self.device]
        command += ["--dtype", str(self.dtype).removeprefix("torch.")]
        command += ["--threads", str(torch.get_num_threads())]
        for option, repository in (
            ("--args-repo", self.source.args),
            ("--vas-repo", self.source.vas),
        ):
            command += [option, str(Path(repository).resolve())] if repository else []
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()  # closes its input: it ends
        self.errors.close()
        self.folder.cleanup()

    def offers(self, method: Method) -> bool:
        """Whether this method's repository is there."""
        return self._repository(method) is not None

    def _repository(self, method: Method) -> str | None:
        return self.source.vas if method.name == "vas" else self.source.args

    def decode(
        self, method: Method, prompt: Sequence[int], steps: int, **more: Any
    ) -> tuple[list[int], list[float]]:
        """New tokens, and seconds of each but the first.

        Raises:
            RuntimeError: with the last words of the published code.
        """
        request = method._asdict() | {"method": method.name, "tokens": list(prompt), "steps": steps}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request | more) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.errors.seek(0)
            words = self.errors.read()[-2000:]
            raise RuntimeError(f"the published code of {method.name} failed:\n{words}")
        found = json.loads(answer)
        self.versions |= found["versions"] | {method.name: _commit(self._repository(method))}
        return found["tokens"], found["seconds"]


def _commit(repository: str | None) -> str:
    command = ["git", "-C", str(repository), "rev-parse", "--short", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def write_models(folder: Path, dtype: torch.dtype, shape: Shape) -> None:
    """Policy and guide as transformers of any version reads them.

    The guide's file holds its language model and its head, so that it is read as a sequence
    classifier (ARGS) and as a language model (VAS), both with warnings about what is left over.
    """
    for name, seed in (("policy", POLICY_SEED), ("guide", GUIDE_SEED)):
        model = random_llama("cpu", "sdpa", dtype, shape, seed)
        weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        if name == "guide":
            weights["score.weight"] = random_head("cpu", dtype, shape).weight.detach()
        (folder / name).mkdir()
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        config = shape | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "torch_dtype": str(dtype).removeprefix("torch."),
            "rms_norm_eps": model.config.rms_norm_eps,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            # transformers would mask this token out of a prompt that has it; the sequence
            # classifier refuses several rows without one.
            "pad_token_id": None if name == "policy" else 0,
        }
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
