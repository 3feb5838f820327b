"""The benchmarks run: as commands, and as cases of pytest-benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLI = [sys.executable, "-m", "fastguide.cli"]


def test_an_unknown_benchmark_is_one_sentence() -> None:
    done = subprocess.run([*CLI, "bench", "speed"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    names = "engine, ops, serving, soak, suite, sweeps, train, ways"
    assert done.stderr == f"error: benchmark is 'speed'; allowed are {names}\n"


@pytest.mark.slow
def test_bench_ops_prints_a_table_and_keeps_a_record(tmp_path: Path) -> None:
    command = [*CLI, "bench", "ops", "--op", "td", "--rounds", "2"]
    record = tmp_path / "ops.json"
    done = subprocess.run(
        [*command, "--save", str(record)], capture_output=True, text=True, check=True
    )
    assert "td_lambda" in done.stdout
    results = json.loads(record.read_text())["results"]
    assert {r["op"] for r in results} == {"td_lambda"}
    assert all(r["speedup"] > 0 and r["runs"]["fastguide"]["ms"] > 0 for r in results)


@pytest.mark.slow
def test_every_case_runs_under_pytest_benchmark() -> None:
    """Each case is checked against the reference and called once."""
    pytest_script = Path(sys.executable).with_name("pytest")  # python -m would add the root
    command = [pytest_script, "benchmarks", "--benchmark-disable", "-q"]
    small = ["-k", "td or lora or (attention and 128) or (topk and -1-)"]
    done = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_sweeps_keep_a_record_and_draw_it(tmp_path: Path) -> None:
    record = tmp_path / "sweeps.json"
    command = [*CLI, "bench", "sweeps", "--sweep", "prefix", "k", "--prefixes", "16", "64"]
    command += ["--candidates", "2", "3", "--prompt", "16", "--steps", "1", "--device", "cpu"]
    subprocess.run([*command, "--save", str(record)], capture_output=True, text=True, check=True)
    found = json.loads(record.read_text())
    assert [p["at"] for p in found["sweeps"]["prefix"]] == [16, 64]
    for p in found["sweeps"]["k"]:
        assert p["cases"]["unguided"]["over_unguided"] == 1.0
        assert all(case["ms"] > 0 and case["floor_ms"] > 0 for case in p["cases"].values())
    assert set(found["prefix_fit"]) == set(found["sweeps"]["k"][0]["cases"])
    for sweep in ("prefix", "k"):
        assert (tmp_path / f"sweeps-{sweep}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["--graphs", "--case", "trunk", "LoRAs", "smaller"]], ids=["host", "fixed"]
)
def test_ways_keep_a_record(tmp_path: Path, more: list[str]) -> None:
    record = tmp_path / "ways.json"
    command = [*CLI, "bench", "ways", "--model", "tiny", "--batch", "2", "--prompt", "8"]
    command += ["--k", "4", "--steps", "2", "--device", "cpu", "--save", str(record), *more]
    subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(record.read_text())
    assert found["graphs"] == bool(more)
    (result,) = found["results"]
    assert result["cases"]["unguided"]["over_unguided"] == 1.0
    assert {"trunk", "one-pass, three LoRAs", "two-phase, smaller guide"} <= result["cases"].keys()


@pytest.mark.slow
def test_serving_keeps_a_record(tmp_path: Path) -> None:
    record = tmp_path / "serving.json"
    command = [*CLI, "bench", "serving", "--requests", "3", "--concurrent", "2", "--prompt", "16"]
    command += ["--new-tokens", "3", "--stories", "2", "--samples", "1", "--rounds", "1"]
    command += ["--device", "cpu", "--save", str(record)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(record.read_text())
    assert found["mixed"]["sooner"] > 0
    assert found["latency"][0]["between_ms"]["p50"] > 0
    for shares in found["profile"]["shares"].values():
        assert sum(s for name, s in shares.items() if name != "host altogether") == pytest.approx(
            1, abs=0.01
        )
    for runs in found["adaptive"].values():
        assert runs["mass 0.95"]["scored_per_step"] < runs["all"]["scored_per_step"] == 20
