"""Studies that are killed go on, and what has changed is made again."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastguide.assets import packaged
from fastguide.evaluate import Runner, read_study
from fastguide.evaluate.stamps import stamp, stamp_reward
from fastguide.files import Draft
from fastguide.models.value import ValueModel

TIMES = {"seconds", "judge_seconds", "seconds_per_response", "tokens_per_second"}
ROUNDED = {"kl", "logprob", "log_ratio"}
"""Sums over logits, which another batch rounds otherwise; what is drawn from them is the same."""


class Killed(Exception):
    pass


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def alike(record: dict[str, Any]) -> dict[str, Any]:
    """What is equal to the same record of another run."""
    return {
        key: pytest.approx(value, rel=1e-5, abs=1e-6) if key in ROUNDED else value
        for key, value in untimed(record).items()
    }


def test_a_killed_study_goes_on(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a point, too: nothing is lost, nothing twice, and the same comes out."""
    whole = Runner(read_study(study), tmp_path / "whole").run()

    def kill(what: str, done: int, of: int) -> None:
        if what == "VAS beta=4" and done == 3:
            raise Killed

    with pytest.raises(Killed):
        Runner(read_study(study), tmp_path / "killed", kill).run()
    (draft,) = (tmp_path / "killed").glob("*.draft.jsonl")
    assert len(list(Draft(draft).parts())) == 3
    draft.write_bytes(draft.read_bytes()[:-9])  # killed while the third was written
    added: list[tuple[int, int]] = []
    add = Draft.add

    def counted(self: Draft, row: Any) -> None:
        added.append((row["prompt"], row["sample"]))
        add(self, row)

    monkeypatch.setattr(Draft, "add", counted)
    results = Runner(read_study(study), tmp_path / "killed").run()
    # Two of four responses of VAS, and the others: 2 prompts, 4 responses each.
    assert len(added) == 2 + 8
    assert not list((tmp_path / "killed").glob("*.draft.jsonl"))
    assert list(map(untimed, results)) == list(map(alike, whole))
    files = {file.name for file in (tmp_path / "whole").glob("responses-*.json")}
    assert files == {file.name for file in (tmp_path / "killed").glob("responses-*.json")}
    for name in files:
        one, other = (
            json.loads((tmp_path / folder / name).read_text())["rows"]
            for folder in ("whole", "killed")
        )
        assert list(map(untimed, other)) == list(map(alike, one))


def test_what_was_cut_short_is_sampled_again(study: Path, tmp_path: Path) -> None:
    """Ctrl-C gives what was begun as aborted responses, which are none."""
    compared = read_study(study)
    point = compared.points[0]

    runner = Runner(compared, tmp_path)
    engine, steps = runner.engine(), itertools.count()
    step = engine.runner.step

    def interrupted(rows: Any) -> Any:
        if next(steps) == 6:  # two of them warm up
            raise KeyboardInterrupt
        return step(rows)

    engine.runner.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        runner.responses(point)
    found = Runner(compared, tmp_path).responses(point)
    assert [(r["prompt"], r["sample"]) for r in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {r["finish_reason"] for r in found} <= {"stop", "length"}


def test_a_guide_that_was_trained_again_is_measured_again(tmp_path: Path) -> None:
    model = ValueModel.create("stories", lora_rank=2)
    model.save_pretrained(tmp_path / "guide")
    before = stamp(str(tmp_path / "guide"))
    assert stamp(str(tmp_path / "guide")) == before != stamp("cheerful")
    torch.nn.init.ones_(model.head.bias)
    model.save_pretrained(tmp_path / "guide")
    assert stamp(str(tmp_path / "guide")) != before
    assert stamp("owner/name") == "owner/name"


def test_any_weight_of_a_merged_adapter_counts(tmp_path: Path) -> None:
    """Its first megabyte is embeddings, which never change."""
    model = ValueModel.create("stories", lora_rank=2)
    merged = model.backbone.merge_and_unload()
    merged.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    before = stamp(folder)
    reward = stamp_reward(f"0.5*classifier:{folder}?on=text")
    last = merged.layers[-1].mlp.down_proj.weight
    with torch.no_grad():
        last[-1, -1] += 1.0
    merged.save_pretrained(tmp_path / "model")
    assert stamp(folder) != before
    assert stamp_reward(f"0.5*classifier:{folder}?on=text") != reward


def test_the_base_of_an_adapter_counts(tmp_path: Path) -> None:
    shutil.copytree(packaged("stories"), tmp_path / "base")
    shutil.copytree(packaged("cheerful"), tmp_path / "guide")
    config = tmp_path / "guide/guide_config.json"
    config.write_text(config.read_text().replace("../stories", "../base"))
    before = stamp(str(tmp_path / "guide"))
    weights = tmp_path / "base/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert stamp(str(tmp_path / "guide")) != before
