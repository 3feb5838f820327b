"""``fastguide generate`` on the packaged model: what goes in, what comes out."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

SHORT = ("--max-tokens", 8, "--seed", 3)
SCHEMA = {
    "prompt": int,
    "sample": int,
    "text": str,
    "token_ids": list,
    "finish_reason": str,
    "mean_kl": float,
    "mean_score": (float, type(None)),
    "seconds": float,
    "seed": int,
    "error": (str, type(None)),
}


def records(result) -> list[dict[str, Any]]:
    """The JSON lines that a command printed, in the order of prompts and samples."""
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return sorted(found, key=lambda record: (record["prompt"], record["sample"]))


def test_text_of_one_prompt_is_printed_alone(run):
    (expected,) = records(run("generate", "Once upon a time", *SHORT, "--json"))
    assert run("generate", "Once upon a time", *SHORT).stdout == expected["text"] + "\n"


def test_json_has_the_promised_fields(run):
    guided = ("--guide", "cheerful:0.5", "--beta", 4, "--k", 5, "--n", 2)
    found = records(run("generate", "Once upon a time", "Tom", *guided, *SHORT, "--json"))
    assert [(r["prompt"], r["sample"]) for r in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for record in found:
        assert record.keys() == SCHEMA.keys()
        for key, kind in SCHEMA.items():
            assert isinstance(record[key], kind), key
        assert len(record["token_ids"]) <= 8
        assert math.isfinite(record["mean_kl"])
        assert record["error"] is None
        assert record["seed"] == 3 or record["sample"]


def test_the_seed_decides(run):
    def texts(seed):
        found = records(run("generate", "Once", "--seed", seed, "--max-tokens", 12, "--json"))
        return [r["token_ids"] for r in found]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_a_guide_changes_the_text_and_rule_none_does_not(run):
    plain = records(run("generate", "Once upon a time", *SHORT, "--json"))
    guide = ("--guide", "cheerful")
    none = records(run("generate", "Once upon a time", *guide, "--rule", "none", *SHORT, "--json"))
    zero = records(run("generate", "Once upon a time", *guide, "--beta", 0, *SHORT, "--json"))
    high = records(run("generate", "Once upon a time", *guide, "--beta", 50, *SHORT, "--json"))
    assert none[0]["token_ids"] == zero[0]["token_ids"] == plain[0]["token_ids"]
    assert high[0]["token_ids"] != plain[0]["token_ids"]
    assert high[0]["mean_kl"] > 0.1
    assert plain[0]["mean_score"] is None


def test_args_and_named_paths(run, copied):
    guide = f"joy={copied('cheerful')}:2"
    rule = ("--rule", "args", "--weight", 0.5, "--k", 4, "--form", "interpolated")
    (found,) = records(
        run("generate", "Tom", "--guide", guide, *rule, "--temperature", 0, *SHORT, "--json")
    )
    assert found["mean_score"] is not None


def test_a_classifier_is_a_reward_guide(run, tiny_model, tiny_guide):
    guide = ("--model", tiny_model, "--guide", f"r={tiny_guide}", "--k", 4)
    (found,) = records(run("generate", "w1 w2", *guide, *SHORT, "--json"))
    assert found["mean_score"] is not None


def test_prompts_from_a_file_and_standard_input(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfOnce upon a time\r\n\nTom had a ball.\n")
    lines = "Once upon a time\nTom had a ball.\n"
    typed = records(run("generate", "Once upon a time", "Tom had a ball.", *SHORT, "--json"))

    def ids(*arguments, **options):
        found = records(run("generate", *arguments, *SHORT, "--json", **options))
        return [r["token_ids"] for r in found]

    expected = [r["token_ids"] for r in typed]
    assert ids("--input", file) == expected
    assert ids("--input", "-", stdin=lines) == expected
    assert ids("-", stdin=lines) == expected
    assert ids(stdin=lines) == expected
    assert ids("Once upon a time", "--input", "-", stdin="Tom had a ball.") == expected


def test_stop_ends_the_text(run):
    (free,) = records(run("generate", "Once", "--seed", 1, "--max-tokens", 40, "--json"))
    assert "." in free["text"]
    (cut,) = records(run("generate", "Once", "--seed", 1, "--stop", ".", "--json"))
    assert cut["text"] == free["text"].partition(".")[0]
    assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize("samples", [1, 3])
def test_a_streamed_text_is_the_blocking_one(run, samples):
    many = ("Once upon a time", "Tom", "--guide", "cheerful", "--n", samples, "--stop", "said")
    exact = ("--seed", 5, "--max-tokens", 24, "--dtype", "float32")  # bfloat16 rounds by batch
    streamed = run("generate", *many, *exact, "--stream")
    found = records(run("generate", *many, *exact, "--json"))
    blocks = "".join(
        f"== prompt {r['prompt']}, sample {r['sample']} ==\n{r['text']}\n" for r in found
    )
    assert streamed.exit_code == 0
    assert streamed.stdout == blocks


def test_output_goes_to_a_file(run, tmp_path):
    file = tmp_path / "out.jsonl"
    result = run("generate", "Once", *SHORT, "--json", "--output", file)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert json.loads(file.read_text())["prompt"] == 0


def test_dtypes(run):
    for dtype in ("float32", "bfloat16"):
        assert records(run("generate", "Once", "--dtype", dtype, *SHORT, "--json"))


def test_a_strength_without_guides_uses_the_packaged_ones(run):
    words = ("generate", "Once upon a time", *SHORT, "--json", "--beta", 4)
    (default,) = records(run(*words))
    (named,) = records(run(*words, "--guide", "cheerful", "--guide", "brief"))
    assert default["mean_score"] is not None
    assert default["mean_score"] == named["mean_score"]


def test_old_results_outlive_a_mistake(run, tmp_path):
    file = tmp_path / "out.txt"
    file.write_text("old", encoding="utf-8")
    words = ("generate", "One day", *SHORT, "--output", file)
    assert run(*words, "--model", "./nowhere").exit_code != 0
    assert file.read_text(encoding="utf-8") == "old"
    assert run(*words).exit_code == 0
    assert "old" not in file.read_text(encoding="utf-8")
