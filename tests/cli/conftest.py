"""A way to call the command line, in this process or in one of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastguide.assets import packaged
from fastguide.cli import app

ENVIRONMENT = {
    "COLUMNS": "80",
    "TERM": "dumb",
    "NO_COLOR": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
}

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Call the command line in this process; arguments become strings."""

    def call(*arguments: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], stdin, env=ENVIRONMENT)

    return call


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Start the command line as a process of its own, which listens to Ctrl-C."""
    # A shell that runs this in the background makes its children deaf to SIGINT: undo that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fastguide.cli import main; main()"
    )

    def call(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=options.pop("stdin", subprocess.DEVNULL),
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
            **options,
        )

    return call


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copy a packaged folder, to be broken; guides find the packaged model beside them."""

    def copy(name: str) -> Path:
        for folder in {name, "stories"}:
            shutil.copytree(packaged(folder), tmp_path / folder, dirs_exist_ok=True)
        return tmp_path / name

    return copy


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a vocabulary of 30 words, smaller than a usual k."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = {word: i for i, word in enumerate(["<end>", "<unk>", *(f"w{i}" for i in range(28))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_guide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier with one label for the tiny model's tokens."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("tiny-guide")
    config = AutoConfig.from_pretrained(tiny_model, num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder
