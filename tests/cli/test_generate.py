"""``fastguide generate`` on the packaged model: what goes in, what comes out."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from typing import Any

import pytest

from fastguide.assets import packaged
from fastguide.cli.arguments import parse_guides
from fastguide.cli.loading import load_engine
from fastguide.cli.output import Printer
from fastguide.request import Completion
from fastguide.rewards import Sample, load_reward

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
    """The JSON lines that a command printed."""
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


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


@pytest.mark.parametrize(
    "more",
    [("--graphs",), ("--way", "two-phase"), ("--max-rows", 1), ("--kv-memory", "64M")],
    ids=str,
)
def test_options_of_speed_and_memory_change_no_text(run, more):
    words = ("generate", "Once upon a time", "Tom", "--guide", "cheerful", *SHORT)
    assert run(*words, *more).stdout == run(*words).stdout != ""


def test_the_seed_decides(run):
    def texts(seed):
        found = records(run("generate", "Once", "--seed", seed, "--max-tokens", 12, "--json"))
        return [r["token_ids"] for r in found]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_a_seed_gives_a_text_again_whatever_stands_beside_it(run):
    """The packaged model and its guides run in float32, unless another dtype is asked for."""
    guided = ("--guide", "cheerful", "--beta", 4, "--max-tokens", 24, "--json")
    many = records(run("generate", "Tom", "Once upon a time", "--n", 3, "--seed", 8, *guided))
    chosen = many[5]
    assert (chosen["prompt"], chosen["sample"]) == (1, 2)
    (again,) = records(run("generate", "Once upon a time", "--seed", chosen["seed"], *guided))
    assert again["token_ids"] == chosen["token_ids"]
    assert again["sample"] == 0


@pytest.mark.parametrize(
    ("model", "dtype", "expected"),
    [
        (None, None, "float32"),
        ("stories", None, "float32"),
        (None, "auto", "bfloat16"),
        (None, "float16", "float16"),
        ("path", None, "bfloat16"),
    ],
)
def test_dtype_of_model_and_guides(stories, model, dtype, expected):
    path = stories if model == "path" else model
    engine = load_engine(path, parse_guides(["cheerful"]), dtype=dtype)
    assert str(engine.runner.policy.model.dtype) == f"torch.{expected}"
    guide = engine.runner.scorers["cheerful"].decoder.model
    assert str(guide.dtype) == f"torch.{expected}"


def test_texts_come_in_the_order_of_the_prompts(run, tmp_path):
    """Though the first is the last to end: it is the only one without a stop."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n" + "and " * 1015 + "\n" + "and " * 1018 + "\n")
    words = ("--input", prompts, "--max-tokens", 12, "--seed", 1, "--n", 2)
    found = records(run("generate", *words, "--json"))
    order = [(prompt, sample) for prompt in range(3) for sample in range(2)]
    assert [(r["prompt"], r["sample"]) for r in found] == order
    lengths = [len(r["token_ids"]) for r in found]
    assert lengths[0] > lengths[2] > lengths[4]
    titles = re.findall(r"(?m)^== .* ==$", run("generate", *words).stdout)
    assert titles == [f"== prompt {prompt}, sample {sample} ==" for prompt, sample in order]


def test_what_waits_for_another_is_printed_in_the_end():
    file = io.StringIO()
    printer = Printer(file, ["a", "b", "c", "d"], samples=2, as_json=False)
    for prompt, sample in ((1, 1), (2, 0), (1, 0), (0, 1)):
        printer.add(Completion(prompt, sample, "text", finish_reason="stop"))
    assert file.getvalue() == ""
    printer.add(Completion(0, 0, "text", finish_reason="aborted"))
    assert file.getvalue().count("==\ntext") == 5
    printer.add(Completion(3, 1, "text", finish_reason="stop"))
    printer.flush()
    titles = re.findall(r"prompt (\d), sample (\d)", file.getvalue())
    assert [int(p + s) for p, s in titles] == [0, 1, 10, 11, 20, 31]
    assert (printer.finished, printer.aborted) == (5, 1)


def test_a_refused_prompt_holds_nothing_up(capsys):
    file = io.StringIO()
    printer = Printer(file, ["a", "b", "c"], samples=2, as_json=False)
    printer.add(Completion(1, 0, finish_reason="error", error="prompt 1: bad"))
    failed = Completion(0, 0, finish_reason="error", error="prompt 0: odd", prompt_tokens=3)
    for completion in (failed, Completion(0, 1, "x", finish_reason="stop"),
                       Completion(2, 0, "y", finish_reason="stop")):  # fmt: skip
        printer.add(completion)
    assert file.getvalue() == "== prompt 0, sample 1 ==\nx\n== prompt 2, sample 0 ==\ny\n"
    assert printer.failed == 2
    assert "prompt 1: bad" in capsys.readouterr().err


def test_a_guide_changes_the_text(run):
    plain = records(run("generate", "Once upon a time", *SHORT, "--json"))
    guide = ("--guide", "cheerful")
    none = records(run("generate", "Once upon a time", "--rule", "none", *SHORT, "--json"))
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


def test_a_copied_guide_is_given_its_base(run, tmp_path):
    shutil.copytree(packaged("cheerful"), tmp_path / "copied")
    words = ("generate", "Tom", *SHORT, "--json", "--guide")
    lost = run(*words, f"joy={tmp_path}/copied")
    assert lost.exit_code == 2
    assert (
        f"error: the guide '{tmp_path}/copied' is a LoRA on '../stories', but there is no model at "
        "'../stories': there is no such folder; name its base model with ValueGuide(path, "
        "base=...), or with --guide-base\n" == lost.stderr
    )
    (found,) = records(run(*words, f"joy={tmp_path}/copied", "--guide-base", "stories"))
    (expected,) = records(run(*words, "cheerful"))
    assert found["token_ids"] == expected["token_ids"]
    assert found["mean_score"] == pytest.approx(expected["mean_score"], abs=1e-4)


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
    settings = ("--seed", 5, "--max-tokens", 24)
    streamed = run("generate", *many, *settings, "--stream")
    found = records(run("generate", *many, *settings, "--json"))
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


def test_best_of_n_prints_the_best_of_what_would_be_sampled(run):
    words = ("generate", "Once upon a time", "The dog", *SHORT, "--json")
    every = records(run(*words, "--n", 6))
    chosen = records(run(*words, "--best-of", 6, "--reward", "length", "--reward", "0.1*vader"))
    reward = load_reward(["length", "0.1*vader"])
    assert [r["prompt"] for r in chosen] == [0, 1]
    for found in chosen:
        rewards = {
            r["text"]: reward([Sample("", r["text"], len(r["token_ids"]))])[0]
            for r in every
            if r["prompt"] == found["prompt"]
        }
        assert found["reward"] == max(rewards.values()) == rewards[found["text"]]


def test_best_of_n_reports_what_fails_and_keeps_the_rest(run):
    result = run("generate", "Once", "", *SHORT, "--best-of", 2, "--reward", "vader", "--json")
    assert result.exit_code == 2
    assert "the prompt is empty" in result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["finish_reason"], second["finish_reason"]) == ("length", "error")


def test_best_of_n_says_so_where_no_response_can_be_judged(run):
    words = ("--best-of", 2, "--reward", "checker:./nowhere-at-all")
    result = run("generate", "Once", *SHORT, *words)
    assert result.exit_code == 2
    assert "prompt 0: no response could be judged, sample 0: FileNotFoundError" in result.stderr


def test_chat_puts_the_template_around_prompts(run, chatting, tmp_path):
    said = "The user said: Once upon\na time\nThe answer is:"
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "Once upon\na time"}))
    words = ("--model", chatting, *SHORT, "--json", "--seed", 1)
    (chat,) = records(run("generate", "--input", file, "--chat", *words))
    (text,) = records(run("generate", said, *words))
    (bare,) = records(run("generate", "--input", file, *words))
    assert chat["token_ids"] == text["token_ids"] != bare["token_ids"]
    best = ("--best-of", 1, "--reward", "length")
    (chosen,) = records(run("generate", "--input", file, "--chat", *words, *best))
    assert chosen["token_ids"] == chat["token_ids"]


def test_chat_needs_a_template(run):
    result = run("generate", "Once", "--chat", *SHORT)
    assert result.exit_code == 2
    assert "the tokenizer has no chat template; use a text" in result.stderr
