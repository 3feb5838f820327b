"""Ctrl-C in the middle: what was done is printed, the exit code is 130, and no traceback."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest

ENDLESS = ("--max-tokens", 900, "--seed", 1)


def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Press Ctrl-C and give what is still printed."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return out, err


@pytest.mark.slow
def test_what_was_streamed_stays(start):
    process = start("generate", "Once upon a time", *ENDLESS, "--guide", "cheerful", "--stream")
    begun = process.stdout.read(20)
    out, err = interrupt(process)
    assert (begun + out).endswith("\n")
    assert len(begun + out) > 20
    assert "1 cut short" in err


@pytest.mark.slow
def test_finished_and_unfinished_completions_are_printed(start, tmp_path):
    # The first prompt nearly fills the context, so it is done long before the second.
    near_end = "and " * 1015
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{near_end}\nOnce upon a time\n")
    process = start("generate", "--input", prompts, *ENDLESS, "--guide", "cheerful", "--json")
    first = json.loads(process.stdout.readline())
    time.sleep(0.5)  # it decodes now
    out, err = interrupt(process)
    rest = [json.loads(line) for line in out.splitlines()]
    assert len(rest) == 1, err
    (second,) = rest
    assert (first["prompt"], first["finish_reason"]) == (0, "length")
    assert (second["prompt"], second["finish_reason"]) == (1, "aborted")
    assert 0 < len(second["token_ids"]) < 900
    assert "1 completions finished, 1 cut short" in err


@pytest.mark.slow
def test_an_interrupt_before_the_model_is_loaded(start):
    process = start("generate", "-", stdin=subprocess.PIPE)
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        interrupt(process)
    else:
        pytest.fail("the command did not wait for its input")


@pytest.mark.slow
def test_a_collection_that_is_interrupted_says_what_it_keeps(start, tmp_path):
    words = ("collect", tmp_path / "data", "--max-tokens", 900, "--max-rows", 1, "--n", 1)
    prompts = ("and " * 1015, "Once upon a time", "Tom")  # the first is done long before the second
    process = start(*words, *prompts)
    draft = tmp_path / "data/rollouts-00000.draft.jsonl"
    while not draft.is_file() and process.poll() is None:
        time.sleep(0.05)
    _, err = interrupt(process)
    assert "interrupted: 1 of 3 responses are in" in err
    assert "the same command continues" in err
