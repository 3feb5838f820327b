"""Reward models and policies by TRL, on real data, and what they are used for."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

from fastguide import ARGS, Engine, RewardGuide, SamplingParams
from fastguide.assets import packaged
from fastguide.rewards import Sample, load_reward
from fastguide.train.preferences import _tokens, read_rows, train_reward, train_sft

trl: Any = pytest.importorskip("trl", reason="trl is not installed")
datasets: Any = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow
DATA = Path(__file__).parents[3] / "shared/data"


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "max_length": 96,
        **more,
    }


def traits() -> list[dict[str, str]]:
    """Statements of a trait and of its opposite, as pairs."""
    file = DATA / "attr_anthropic_evals/agreeableness.jsonl"
    if not file.is_file():
        pytest.skip(f"the data {file} are absent")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    yes = [r["statement"] for r in rows if r["answer_matching_behavior"].strip() == "Yes"]
    no = [r["statement"] for r in rows if r["answer_matching_behavior"].strip() == "No"]
    return [{"chosen": a, "rejected": b} for a, b in zip(yes, no, strict=False)]


@pytest.mark.parametrize("lora_rank", [None, 8])
def test_a_reward_model_learns_a_trait_and_guides(tmp_path: Path, lora_rank: int | None) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, traits()[:240])))
    folder = tmp_path / "reward"
    config = trl.RewardConfig(**settings(folder))
    rows = read_rows("reward", [file])
    metrics = train_reward(rows, "stories", config, lora_rank=lora_rank, held_out=0.25)
    assert metrics["eval_accuracy"] > 0.6
    judge = load_reward(f"classifier:{folder}?on=response")
    kind, unkind = judge([Sample("", "I love to help people.", 5), Sample("", "I hate people.", 4)])
    assert kind > unkind
    engine = Engine("stories", {"kind": RewardGuide(folder)}, dtype="float32")
    (output,) = engine.generate(
        ["I"], ARGS(weight=2.0, k=5), {"kind": 1.0}, SamplingParams(temperature=0, max_tokens=5)
    )
    assert len(output.token_ids) == 5


def test_a_seed_gives_a_reward_model_its_bytes(tmp_path: Path) -> None:
    file, made = tmp_path / "pairs.jsonl", []
    file.write_text("\n".join(map(json.dumps, traits()[:24])))
    for name in ("one", "two"):
        config = trl.RewardConfig(**settings(tmp_path / name, num_train_epochs=1, seed=5))
        train_reward(read_rows("reward", [file]), "stories", config, held_out=0.25)
        made.append((tmp_path / name / "model.safetensors").read_bytes())
        torch.rand(3)  # what was drawn before does not matter
    assert made[0] == made[1]


def test_dialogue_pairs_are_read_and_trained_on(tmp_path: Path) -> None:
    source = DATA / "pref_hh_rlhf/harmless-base-test.jsonl.gz"
    if not source.is_file():
        pytest.skip(f"the data {source} are absent")
    few = tmp_path / "few.jsonl.gz"
    lines = gzip.decompress(source.read_bytes()).splitlines()[:40]
    few.write_bytes(gzip.compress(b"\n".join(lines)))
    config = trl.RewardConfig(**settings(tmp_path / "reward", num_train_epochs=1))
    metrics = train_reward(read_rows("reward", [few]), "stories", config, held_out=0.2)
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert (tmp_path / "reward/model.safetensors").is_file()
    assert not (tmp_path / "reward/README.md").exists()  # TRL's would name no base model


def test_a_policy_is_fine_tuned(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"The answer is {i % 3}."}) for i in range(64)))
    config = trl.SFTConfig(**settings(tmp_path / "policy"))
    metrics = train_sft(read_rows("sft", [file]), "stories", config, held_out=0.2)
    assert metrics["eval_loss"] < 1.5
    engine = Engine(tmp_path / "policy", guides={}, dtype="float32")
    (output,) = engine.generate(
        ["The answer"], sampling=SamplingParams(temperature=0, max_tokens=4)
    )
    assert output.text.startswith(" is")


def pairs(word: str, count: int = 24) -> Any:
    return datasets.Dataset.from_list(
        [{"chosen": f"I am {word} {i}.", "rejected": f"You are {i}."} for i in range(count)]
    )


class Kill(TrainerCallback):
    """Ends the process after a step, and counts how many there were."""

    def __init__(self, step: int | None = None) -> None:
        self.step, self.steps = step, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
        self.steps += 1


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_killed_run_continues_with_the_same_alone(tmp_path: Path, lora_rank: int | None) -> None:
    options = settings(tmp_path, save_strategy="steps", save_steps=1, max_steps=4)

    def train(rows: Any, step: int | None = None, **changed: Any) -> int:
        of_config = {k: v for k, v in changed.items() if k != "held_out" and k != "lora_rank"}
        more = {"lora_rank": lora_rank, "held_out": 0.25}
        more |= {k: v for k, v in changed.items() if k not in of_config}
        counted = Kill(step)
        config = trl.RewardConfig(**(options | of_config))
        train_reward(rows, "stories", config, callbacks=[counted], **more)
        return counted.steps

    with pytest.raises(KeyboardInterrupt):
        train(pairs("glad"), step=2)
    # What was written before the record is no whole checkpoint.
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3/training.json").unlink()
    for changed, said in (
        ({"held_out": 0.5}, "has held_out 0.25, this run has 0.5"),
        ({"lora_rank": 4}, f"has lora_rank {lora_rank}, this run has 4"),
        ({"learning_rate": 1e-4}, "has learning_rate 0.001, this run has 0.0001"),
        ({"max_length": 32}, "has max_length 96, this run has 32"),
    ):
        with pytest.raises(ValueError, match=said):
            train(pairs("glad"), **changed)
    with pytest.raises(ValueError, match=r"checkpoint-2 has sha256 '\w+', this run has '\w+'"):
        train(pairs("sad"))
    with pytest.raises(ValueError, match="has rows 24, this run has 25"):
        train(pairs("glad", 25))
    assert train(pairs("glad")) == 2
    record = json.loads((tmp_path / "training.json").read_text())
    assert (record["kind"], record["base_model"], record["rows"]) == ("reward", "stories", 24)
    assert record["lora_rank"] == lora_rank
    assert record["hyperparameters"]["max_length"] == 96
    assert 0 <= record["validation"]["accuracy"] <= 1
    assert train(pairs("glad")) == 0  # it has finished
    with pytest.raises(ValueError, match="has sha256"):
        train(pairs("sad"))


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_rows("reward", [tmp_path / "none.jsonl"])
    (tmp_path / "rows.jsonl").write_text('{"chosen": "a"}\n')
    with pytest.raises(ValueError, match="rows have chosen; needed are chosen and rejected"):
        read_rows("reward", [tmp_path / "rows.jsonl"])
    (tmp_path / "rows.parquet").write_text("")
    with pytest.raises(ValueError, match="one type at a time"):
        read_rows("reward", [tmp_path / "rows.jsonl", tmp_path / "rows.parquet"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"'.*empty.jsonl' is empty; needed are rows"):
        read_rows("reward", [tmp_path / "empty.jsonl"])
    (tmp_path / "broken.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": \n')
    with pytest.raises(ValueError, match="cannot read rows from"):
        read_rows("reward", [tmp_path / "broken.jsonl"])


def test_pairs_are_trained_on_as_rewards_read_them(tmp_path: Path) -> None:
    """Without an end of text, long ones without their beginning."""
    tokenizer = AutoTokenizer.from_pretrained(packaged("stories"))
    long = "Tom saw a dog. " * 30
    rows = datasets.Dataset.from_list(
        [{"prompt": "Once", "chosen": " upon a time", "rejected": long}]
    )
    (found,) = _tokens(rows, tokenizer, 16)
    assert found["chosen_ids"] == tokenizer("Once upon a time").input_ids
    assert found["rejected_ids"] == tokenizer("Once" + long).input_ids[-16:]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    user, kind = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    chats = datasets.Dataset.from_list([{"prompt": [user], "chosen": [kind], "rejected": [user]}])
    (found,) = _tokens(chats, tokenizer, None)
    assert tokenizer.decode(found["chosen_ids"]) == "<user>Hi<assistant>Hello"
