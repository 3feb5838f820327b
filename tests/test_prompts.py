"""Prompts from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastguide.prompts import read_file, read_lines


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffOne day\r\n\n  \n \u2028Two\n".encode())
    assert read_file(file) == ["One day", " \u2028Two"]


def test_json_lines_hold_prompts_of_several_lines(tmp_path: Path) -> None:
    said = ["\n\nHuman: Hi\n\nAssistant:", "One", "Two"]
    lines = [{"prompt": said[0], "chosen": "no matter"}, said[1], {"prompt": said[2]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_file(str(file)) == said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("", "holds no prompt; allowed is one per line"),
        (" \n", "holds no prompt; allowed is one per line"),
        ('"One"\n[3]', r"line 2 of .*'\[3\]'; allowed are texts and objects whose 'prompt' is one"),
        ('{"text": "One"}', "line 1 of .*; allowed are texts and objects whose 'prompt' is one"),
        ('{"prompt": 3}', "line 1 of .*; allowed are texts and objects whose 'prompt' is one"),
        ('"One"\n\nTwo', "line 3 of .* is not JSON"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path: Path, data: str, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(data)
    with pytest.raises(ValueError, match=said):
        read_file(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read prompts from '.*nowhere.txt': No such file"):
        read_file(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="cannot read prompts from here: it is not UTF-8 text"):
        read_lines(b"\xff\xfe", "here")
