"""The commands that make guides, as a person runs them."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastguide.cli import app
from fastguide.cli.settings import configured, fields_of


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fastguide.cli", *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    lines = [f"{a} {b}" for a in ("Once", "Tom had", "Lily") for b in ("a", "the", "one", "two")]
    (folder / "prompts.txt").write_text("\n".join(lines))
    said = run(
        "collect", folder / "data", "--input", folder / "prompts.txt", "--max-tokens", "12",
        "--reward", "cheerfulness", "--shard", "5",
    )  # fmt: skip
    assert said.startswith("24 responses of stories@")
    assert "24 rewards (cheerfulness) as 'reward' in" in said
    return folder / "data"


@pytest.mark.slow
def test_from_prompts_to_a_measured_guide(data: Path, tmp_path: Path) -> None:
    again = run("collect", data, "--input", data.parent / "prompts.txt", "--max-tokens", "12",
                "--shard", "5")  # fmt: skip
    assert "24 responses" in again
    assert "not judged yet" not in again
    said = run("label", data, "--reward", "0.5*vader", "--reward", "length", "--labels", "mixed")
    assert "24 rewards (0.5*vader + 1*length) as 'mixed'" in said
    guide = tmp_path / "guide"
    said = run("train", "value", data, "--out", guide, "--epochs", "1", "--held-out", "0.3",
               "--lora-rank", "2", "--lora-alpha", "4", "--dtype", "bfloat16",
               "--set", "gradient_accumulation_steps=2")  # fmt: skip
    assert f"guide in {guide}; on held-out prompts: mse " in said
    facts = json.loads((guide / "guide_config.json").read_text())["training"]
    assert (facts["dtype"], facts["lora"]) == ("bfloat16", {"rank": 2, "alpha": 4})
    said = run("validate", guide, "--data", data, "--set", tmp_path / "set", "--held-out", "0.3",
               "--completions", "2")  # fmt: skip
    made, measured = (
        int(re.search(words, said)[1])  # type: ignore[index]
        for words in (r"validation set of (\d+) prefixes", r"noise of the (\d+) labels")
    )
    assert made == measured
    assert "(64 were asked for)" in said
    assert f"{guide}: MSE " in said
    said = run("train", "fudge", data, "--out", tmp_path / "fudge", "--epochs", "1", "--freeze",
               "--head", "mlp", "--held-out", "0.3")  # fmt: skip
    assert "loss" in said
    said = run("train", "value", data, "--out", tmp_path / "swept", "--epochs", "1", "--freeze",
               "--held-out", "0.3", "--sweep", "lr=1e-4,1e-3")  # fmt: skip
    assert "best of the sweep: learning_rate " in said
    generated = run("generate", "Once", "--guide", f"mine={guide}", "--max-tokens", "4")
    assert generated.strip()


VALUE = ["train", "value", "DATA", "--out", "x"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["label", "DATA"], "no --reward is given"),
        (["label", "DATA", "--reward", "joy"], "reward is 'joy'; allowed are cheerfulness"),
        (["label", "/none", "--reward", "vader"], "no rollouts at /none"),
        (["train", "value", "DATA", "--out", "x", "--labels", "joy"], "has no 'joy'; it has"),
        (["train", "value", "DATA", "--out", "x", "--lam", "2"], "lam must lie in [0, 1]"),
        (["train", "value", "DATA", "--out", "x", "--head", "tree"], "head is 'tree'"),
        (["train", "value", "DATA", "--out", "x", "--full", "--freeze"], "--full and --freeze"),
        (["train", "value", "DATA", "--out", "x", "--set", "speed=9"], "--set is 'speed=9'"),
        (["train", "value", "DATA", "--out", "x", "--full", "--lora-rank", "4"], "are both given"),
        (
            ["train", "value", "DATA", "--out", "x", "--sweep", "learing_rate=1,2"],
            "--sweep is 'learing_rate=1,2'; allowed is NAME=VALUE with a name of transformers' "
            "TrainingArguments, such as learning_rate",
        ),
        (["train", "value", "DATA", "--out", "x", "--labels", "rollouts"], "as responses are"),
        (["label", "DATA", "--reward", "vader", "--labels", "../x"], "a name is '../x'; allowed"),
        (["collect", "x", "Once", "--workers", "2"], "--workers is 2; allowed with --ray"),
        (["collect", "x", "Once", "--gpus", "1"], "--gpus is 1; allowed with --ray"),
        (
            ["collect", "x", "Once", "--ray", "--device", "cuda"],
            "--device is 'cuda'; allowed without --ray, which takes --gpus",
        ),
        ([*VALUE, "--set", "lam=abc"], "lam is 'abc'; allowed are numbers"),
        ([*VALUE, "--set", "save_steps=abc"], "save_steps is 'abc'; allowed are numbers"),
        ([*VALUE, "--set", "save_strategy=abc"], "abc is not a valid SaveStrategy"),
        ([*VALUE, "--set", "report_to=tensorbord"], "report_to is 'tensorbord'; allowed are none"),
        ([*VALUE, "--set", "fsdp=full_shard"], "fsdp is asked for, which cuts weights in parts"),
        ([*VALUE, "--set", "lr=1", "--set", "lr=2"], "--set gives learning_rate more than once"),
        (
            [*VALUE, "--sweep", "lr=1", "--sweep", "lr=2"],
            "--sweep gives learning_rate more than once; allowed is once",
        ),
        (
            [*VALUE, "--set", "lr=1", "--sweep", "lr=1,2"],
            "learning_rate is given by --set and --sweep; allowed is one of them",
        ),
        ([*VALUE, "--patience", "1", "--held-out", "0"], "held_out is 0.0, which leaves none"),
        ([*VALUE, "--dtype", "int8"], "dtype is 'int8'; allowed are auto, float32"),
        ([*VALUE, "--freeze", "--lora-alpha", "8"], "--lora-alpha is 8; allowed with a LoRA"),
        (["collect", "x", "Once", "--temperature", "0"], "temperature is 0.0; allowed are numbers"),
        (["collect", "/proc/nowhere", "Once"], "'/proc/nowhere': No such file or directory"),
        (["validate", "--set", "x", "--prompts", "0"], "--prompts is 0; allowed are whole"),
        (["validate", "--set", "x", "--completions", "1"], "--completions is 1; allowed are whole"),
        (["train", "reward", "x", "--out", "x", "--max-length", "-1"], "--max-length is -1"),
        (["validate", "--set", "x"], "neither --data nor a guide is given"),
        (["validate", "cheerful", "--set", "/none"], "no rollouts at /none"),
    ],
)
def test_mistakes_are_one_sentence(data: Path, tmp_path: Path, words: list[str], said: str) -> None:
    given = [str(data) if w == "DATA" else str(tmp_path / w) if w == "x" else w for w in words]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_objections_to_settings_are_one_sentence(error: type[Exception]) -> None:
    @dataclasses.dataclass
    class Odd:
        size: int = 1

        def __post_init__(self) -> None:
            raise error("the size\n  is odd")

    assert fields_of(Odd) == {"size"}
    with pytest.raises(ValueError, match="the size is odd"):
        configured(Odd, {"size": 3})
    with pytest.raises(ValueError, match="size is 'x'; allowed are numbers"):
        configured(Odd, {"size": "x"})
