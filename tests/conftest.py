"""Fixtures: the packaged model, and guides on it that need no training."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the hub; read when the libraries are imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run as Python, read when imported
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    share = max(1, (os.cpu_count() or 1) // workers)  # of the cores, for its child processes too
    os.environ["OMP_NUM_THREADS"] = str(share)
    torch.set_num_threads(share)

from fastguide.assets import packaged
from fastguide.models.value import ValueModel


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def stories() -> str:
    """Path of the packaged language model."""
    return str(packaged("stories"))


@pytest.fixture(scope="session")
def chatting(stories: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the packaged language model with a chat template."""
    folder = tmp_path_factory.mktemp("chatting") / "model"
    shutil.copytree(stories, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}The {{ m.role }} said: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}The answer is:{% endif %}"
    )
    return str(folder)


def _guide(folder: Path, base: str, seed: int, **options: Any) -> str:
    torch.manual_seed(seed)
    model = ValueModel.create(base, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        model.head.weight.normal_(std=0.05)
        model.head.bias.fill_(0.1)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def lora_guide(stories: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a LoRA value guide with random weights."""
    return _guide(tmp_path_factory.mktemp("lora"), stories, 1, lora_rank=4)


@pytest.fixture(scope="session")
def full_guide(stories: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a value guide with full weights and a random head."""
    return _guide(tmp_path_factory.mktemp("full"), stories, 2, lora_rank=None)


@pytest.fixture(scope="session")
def head_guide(stories: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random head on the frozen story model."""
    return _guide(tmp_path_factory.mktemp("head"), stories, 3, freeze=True)
