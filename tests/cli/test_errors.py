"""Wrong input: one clear sentence on standard error, exit code 2, and nothing else is lost."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

LONG = "word " * 2000
GUIDED = ("--guide", "cheerful")
BEST = ("--best-of", "4", "--reward", "vader")


def one_sentence(result) -> str:
    """The error of a call that had to fail."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", LONG], "allowed are at most 1023"),
        (["generate", "Once", *GUIDED, "--k", "0"], "k is 0; allowed are whole numbers from 1"),
        (["generate", "Once", *GUIDED, "--k", "257"], "k is 257; allowed are"),
        (["generate", "Once", "--guide", "grumpy"], "unknown guide 'grumpy'"),
        (["generate", "Once", "--guide", "a=./nowhere"], "no guide at './nowhere'"),
        (["generate", "Once", "--guide", "cheerful:x"], "weight of guide 'cheerful' is 'x'"),
        (["generate", "Once", "--guide", "c=./cheerful:x"], "no guide at './cheerful:x'"),
        (["generate", "Once", *GUIDED, "--rule", "none"], "allowed with rule vas, args or fudge"),
        (
            ["generate", "Once", *GUIDED, "--guide-base", "stories"],
            "allowed with --guide NAME=PATH",
        ),
        (["generate", "Once", "--model", "./nowhere"], "no model at './nowhere': there is no such"),
        (["generate", "Once", "--model", "cheerful"], "no model at 'cheerful': it is a guide"),
        (["generate", "Once", "--model", "no-such/model"], "the hub cannot be reached"),
        (["generate", "Once", "--guide", "g=no-such/guide"], "the hub cannot be reached"),
        (["generate", "Once", *GUIDED, "--rule", "dpo"], "allowed are vas, args, fudge, none"),
        (["generate", "Once", "--dtype", "int8"], "dtype is 'int8'; allowed are auto, float32"),
        (["generate", "Once", "--device", "toaster"], "device is 'toaster'"),
        (["generate", "Once", "--temperature", "-1"], "temperature is -1.0; allowed are"),
        (["generate", "Once", "--max-tokens", "0"], "max_tokens is 0; allowed are"),
        (["generate", "Once", "--n", "0"], "n is 0; allowed are"),
        (["generate", "Once", "--stop", ""], "stop is ('',); allowed are"),
        (["generate", "Once", *GUIDED, "--beta", "nan"], "beta is nan; allowed are"),
        (["generate", "Once", "--guide", "cheerful:1e300"], "weight of guide 'cheerful'"),
        (["generate", "Once", "--stream", "--json"], "allowed is one of them"),
        (["generate", "Once", "--best-of", "4"], "for example --reward cheerfulness"),
        (["generate", "Once", "--reward", "vader"], "allowed with --best-of N"),
        (["generate", "Once", *BEST, "--n", "2"], "--best-of and --n are both given"),
        (["generate", "Once", *BEST, "--stream"], "--best-of and --stream are both given"),
        (["generate", "Once", *BEST, "--best-of", "0"], "n is 0; allowed are whole numbers from 1"),
        (["generate", "Once", *BEST, "--reward", "joy"], "reward is 'joy'; allowed are"),
        (["generate", "Once", *BEST, "--temperature", "0"], "all responses are the same"),
        (["generate", "--input", "./nowhere.txt"], "cannot read prompts from './nowhere.txt'"),
        (["generate", "Once", "--output", "./nowhere/out"], "cannot write to './nowhere/out'"),
        (["generate", "Once", "--output", "/"], "cannot write to '/'"),
        (["generate"], "standard input holds no prompt"),
        (["generate", "Once", "--k", "many"], "'--k': 'many'; allowed are whole numbers"),
        (["generate", "Once", "--n", "1.5"], "'--n': '1.5'; allowed are whole numbers"),
        (["generate", "Once", "--seed", ""], "'--seed': ''; allowed are whole numbers"),
        (["generate", "Once", "--beta", "x"], "'--beta': 'x'; allowed are numbers"),
        (["generate", "Once", "--n", "100001"], "n is 100001; allowed are"),
        (["generate", "Once", "--guide"], "'--guide' requires an argument"),
        (["generate", "Once", "--bogus"], "no such option: --bogus"),
        (["--bogus"], "no such option: --bogus"),
        (["generat"], "no such command 'generat'"),
        (["demo", "--n", "few"], "'--n': 'few'; allowed are whole numbers"),
        (["demo", "--beta", "inf"], "beta is inf; allowed are"),
        (["demo", "--n", "0"], "n is 0; allowed are"),
        (["demo", "--prompt", ""], "the prompt is empty"),
    ],
)
def test_wrong_input(run, arguments, message):
    assert message in one_sentence(run(*arguments))


def test_k_above_the_vocabulary(run, tiny_model, tiny_guide):
    guide = ("--model", tiny_model, "--guide", f"r={tiny_guide}")
    assert "allowed are 1 to 30 (vocabulary)" in one_sentence(
        run("generate", "w1", *guide, "--k", 31)
    )
    assert run("generate", "w1", *guide, "--k", 30, "--max-tokens", 3).exit_code == 0


def test_a_base_of_other_shape_is_refused(run, copied, tiny_model):
    guide = ("--guide", f"g={copied('cheerful')}", "--guide-base", tiny_model)
    assert "does not fit the model" in one_sentence(run("generate", "Once", *guide))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(run, start):
    words = ("generate", "Once", "--max-tokens", 4)
    message = "cannot write to '/dev/full': No space left on device"
    assert one_sentence(run(*words, "--output", "/dev/full")) == message
    assert one_sentence(run(*words, "--output", "/dev/full", "--stream")) == message
    with Path("/dev/full").open("w") as full:
        process = start(*words, stdout=full)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    *_, last = errors.splitlines()  # libraries may have warned before
    assert last == "error: cannot write to standard output: No space left on device"


def test_a_guide_for_other_tokens(run, tiny_guide):
    message = one_sentence(run("generate", "Once", "--guide", f"r={tiny_guide}"))
    assert "another tokenizer" in message


@pytest.mark.parametrize(
    ("folder", "file", "option"),
    [
        ("stories", "model.safetensors", "--model"),
        ("cheerful", "adapter_model.safetensors", "--guide"),
        ("cheerful", "value_head.safetensors", "--guide"),
        ("cheerful", "guide_config.json", "--guide"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_corrupt_and_missing_weights(run, copied, folder, file, option, damage):
    broken = copied(folder)
    if damage == "gone":
        (broken / file).unlink()
    else:
        data = (broken / file).read_bytes()
        (broken / file).write_bytes(data[: len(data) // 2])
    value = broken if option == "--model" else f"g={broken}"
    message = one_sentence(run("generate", "Once", option, value))
    assert str(broken) in message


def test_a_file_that_is_not_text(run, tmp_path):
    file = tmp_path / "prompts"
    file.write_bytes(b"\xff\xfe\x00bad")
    assert "not UTF-8" in one_sentence(run("generate", "--input", file))


@pytest.mark.parametrize("stream", [False, True])
def test_one_bad_prompt_fails_alone(run, stream):
    prompts = ("Once upon a time", LONG, "Tom had a ball.")
    settings = ("--max-tokens", 6, "--seed", 1, *(["--stream"] if stream else []))
    result = run("generate", *prompts, *settings)
    assert "prompt 1: the prompt has" in one_sentence(result)
    assert "== prompt 0, sample 0 ==" in result.stdout
    assert "== prompt 2, sample 0 ==" in result.stdout
    assert "prompt 1" not in result.stdout
    assert result.stdout.index("prompt 0") < result.stdout.index("prompt 2")


def test_one_bad_prompt_is_a_json_line_too(run):
    result = run("generate", "Once", "", "Tom", "--max-tokens", 4, "--json")
    assert "prompt 1: the prompt is empty" in one_sentence(result)
    found = {r["prompt"]: r for r in map(json.loads, result.stdout.splitlines())}
    assert found[1]["finish_reason"] == "error"
    assert "empty" in found[1]["error"]
    assert found[0]["error"] is found[2]["error"] is None


def test_exit_codes_of_a_process(start):
    for arguments, code in (
        (["--version"], 0),
        (["generate", "x", "--rule", "none", "--beta", "2"], 2),
    ):
        process = start(*arguments)
        process.communicate(timeout=120)
        assert process.returncode == code


def test_a_reader_that_leaves_is_no_error(start):
    process = start(
        "generate", "Once", "--n", "60", "--max-tokens", "40", "--json", stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) in (0, 141)
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
