"""Training in two processes: both see every episode once, and end with one set of weights."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastguide import Engine
from fastguide.models.guide_config import GuideConfig
from fastguide.models.value import ValueModel
from fastguide.rewards import load_reward
from fastguide.train.collect import read
from fastguide.train.guides import is_held_out
from fastguide.train.settings import check_processes
from fastguide.train.validation import make_validation, validate

pytestmark = pytest.mark.slow

SCRIPT = """
import os, sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastguide.models.value import ValueModel
from fastguide.train.episodes import Episode
from fastguide.train.value import ValueConfig, ValueTrainer

folder = Path(sys.argv[1])
episodes = [
    Episode((0, 5 + i % 7), (300 + i, *range(7, 9 + (i * i) % 23)), (-1.0) ** i) for i in range(64)
]
torch.manual_seed(0)
model = ValueModel.create("stories", lora_rank=2)
config = ValueConfig(
    output_dir=str(folder), per_device_train_batch_size=int(sys.argv[2]), num_train_epochs=2,
    learning_rate=3e-3, optim="sgd", max_grad_norm=1e9, use_cpu=True, save_strategy="no",
    disable_tqdm=True,
    ema=0.5,
)
trainer = ValueTrainer(model, config, episodes, episodes[:21])
seen = []
collate = trainer.data_collator
def counted(rows):
    seen.extend(int(row.response_ids[0]) for row in rows)
    return collate(rows)
trainer.data_collator = counted
trainer.train()
metrics = trainer.evaluate()
trainer.save_model(str(folder / "guide"))
rank = os.environ.get("RANK", "0")
state = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
state["seen"] = torch.tensor(sorted(seen))
state["mse"] = torch.tensor([metrics["eval_mse"]])
save_file(state, folder / f"rank{rank}.safetensors")
"""


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(folder: Path, processes: int, batch_size: int) -> None:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    words = [sys.executable, str(script), str(folder), str(batch_size)]
    if processes > 1:
        words = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}", *words[1:],
        ]  # fmt: skip
    done = subprocess.run(
        words, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    run(tmp_path / "one", 1, 16)
    run(tmp_path / "two", 2, 8)
    alone = load_file(tmp_path / "one/rank0.safetensors")
    ranks = [load_file(tmp_path / f"two/rank{r}.safetensors") for r in (0, 1)]
    weights = [name for name in alone if name not in ("seen", "mse")]
    for name in weights:
        assert torch.equal(ranks[0][name], ranks[1][name]), name
    # The 64 episodes of each of two epochs, then 21 for validation.
    both = sorted(torch.cat([rank["seen"] for rank in ranks]).tolist())
    assert [both.count(300 + i) for i in range(30, 64)] == [2] * 34
    # Rows have other numbers of states: the loss is the mean over those of both processes.
    for name in weights:
        torch.testing.assert_close(ranks[0][name], alone[name], rtol=1e-3, atol=1e-5)
    assert ranks[0]["mse"].item() == pytest.approx(alone["mse"].item(), rel=1e-3)
    assert (tmp_path / "two/guide/guide_config.json").is_file()


@pytest.mark.parametrize("kind", ["value", "fudge"])
def test_the_command_speaks_once(
    engine: Engine, decode: Any, data: Path, tmp_path: Path, kind: str
) -> None:
    """As docs/train.md launches it on a CPU: one process says all there is, and validates."""
    words = ["train", kind, data, "--out", tmp_path / "guide", "--lora-rank", 2, "--epochs", 1]
    words += ["--held-out", 0.3, "--set", "disable_tqdm=True", "--patience", 1]
    if kind == "value":
        rollouts = [r for r in read(data) if r.sample == 0 and is_held_out(r.prompt_ids, 0.3)]
        reward = load_reward("cheerfulness")
        made = {"max_tokens": 20, "completions": 2, "held_out": 0.3}
        make_validation(engine, rollouts, tmp_path / "set", reward, decode, **made)
        words += ["--validation", tmp_path / "set"]
    # What accelerate launch starts for several GPUs; without one it would start one process.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["-m", "fastguide.cli", *map(str, words)]
    done = subprocess.run(
        launch, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("responses to train on") == 1
    assert done.stdout.count(f"guide in {tmp_path / 'guide'}; on held-out prompts: ") == 1
    (count,) = re.findall(r"(\d+) responses to train on", done.stdout)
    (checkpoint,) = (tmp_path / "guide").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{math.ceil(int(count) / (32 * 2))}"  # both trained
    kept = GuideConfig.load(tmp_path / "guide").training["validation"]
    assert ("mc_mse" in kept) == (kind == "value")
    if kind == "value":
        model = ValueModel.from_pretrained(tmp_path / "guide", dtype=torch.float32)
        assert kept["mc_mse"] == pytest.approx(validate(model, tmp_path / "set").mse.mean, rel=1e-4)
    assert "find_unused_parameters" not in done.stderr


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone: Any = SimpleNamespace(world_size=1)
    with pytest.raises(ValueError, match="2 processes were started, of which each knows 1"):
        check_processes(alone)
