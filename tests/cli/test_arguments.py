"""From what is typed to guides, rules and prompts, without any model."""

from __future__ import annotations

import pytest

from fastguide import ARGS, VAS, Plain
from fastguide.cli.arguments import (
    GuideArgument,
    build_rule,
    parse_guide,
    parse_guides,
    parse_memory,
    unescape,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cheerful", ("cheerful", "cheerful", 1.0)),
        ("cheerful:-1", ("cheerful", "cheerful", -1.0)),
        ("cheerful:.5", ("cheerful", "cheerful", 0.5)),
        ("cheerful:1e-2", ("cheerful", "cheerful", 0.01)),
        ("a=some/hub-id", ("a", "some/hub-id", 1.0)),
        ("a=some/hub-id:0.25", ("a", "some/hub-id", 0.25)),
        (r"a=C:\models\guide", ("a", r"C:\models\guide", 1.0)),
        (r"a=C:\models\guide:2", ("a", r"C:\models\guide", 2.0)),
        ("a=x:y", ("a", "x:y", 1.0)),
        ("a=x=y:3", ("a", "x=y", 3.0)),
        ("a=cheerful:+2", ("a", "cheerful", 2.0)),
    ],
)
def test_guides(text, expected):
    assert parse_guide(text) == GuideArgument(*expected)


def test_a_path_that_exists_is_taken_whole(tmp_path):
    (tmp_path / "run:2").mkdir()
    assert parse_guide(f"a={tmp_path}/run:2").path == f"{tmp_path}/run:2"
    assert parse_guide(f"a={tmp_path}/run:2:-1") == GuideArgument("a", f"{tmp_path}/run:2", -1.0)


@pytest.mark.parametrize("text", ["grumpy", "stories", "", ":2", "=path", "a=", "grumpy:1"])
def test_guides_that_are_refused(text):
    with pytest.raises(ValueError):
        parse_guide(text)


@pytest.mark.parametrize("weight", ["abc", "nan", "inf", "", "1,5"])
def test_a_weight_that_is_no_number(tmp_path, weight):
    (tmp_path / "guide").mkdir()
    for path, text in (
        ("cheerful", f"cheerful:{weight}"),
        ("brief", f"short=brief:{weight}"),
        (f"{tmp_path}/guide", f"mine={tmp_path}/guide:{weight}"),
    ):
        with pytest.raises(ValueError) as caught:
            parse_guide(text)
        assert str(caught.value) == f"weight of guide '{path}' is '{weight}'; allowed are numbers"


def test_an_unknown_guide_names_the_packaged_ones():
    with pytest.raises(ValueError, match=r"unknown guide 'grumpy'.*cheerful.*NAME=PATH"):
        parse_guide("grumpy")


def test_a_name_twice_is_refused():
    with pytest.raises(ValueError, match="2 times"):
        parse_guides(["cheerful", "cheerful:2"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"name": None, "guided": False}, Plain()),
        ({"name": None, "guided": True}, VAS()),
        ({"name": "none", "guided": False}, Plain()),
        ({"name": "vas", "guided": True, "beta": -2.0, "k": 5}, VAS(-2.0, 5)),
        ({"name": None, "guided": True, "fill": "drop"}, VAS(fill="drop")),
        ({"name": "args", "guided": True, "weight": 2.0}, ARGS(2.0)),
        (
            {"name": "args", "guided": True, "weight": 0.3, "form": "interpolated"},
            ARGS(0.3, form="interpolated"),
        ),
    ],
)
def test_rules(arguments, expected):
    assert build_rule(**arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dpo", "guided": True}, "'dpo'; allowed are vas, args, fudge, none"),
        ({"name": "vas", "guided": False}, "no guide is given"),
        (
            {"name": "none", "guided": True},
            "--guide .*'none'; allowed with rule vas, args or fudge",
        ),
        ({"name": "vas", "guided": True, "weight": 2.0}, "--weight .*allowed with rule args"),
        ({"name": "args", "guided": True, "beta": 2.0}, "--beta .*allowed with rule vas"),
        ({"name": None, "guided": False, "k": 2}, "no --guide .*vas or args"),
        ({"name": "vas", "guided": True, "k": 0}, "k is 0; allowed are"),
        ({"name": "vas", "guided": True, "k": 257}, "k is 257; allowed are"),
        ({"name": "vas", "guided": True, "fill": "zero"}, "fill is 'zero'; allowed are"),
        ({"name": "args", "guided": True, "form": "x"}, "form is 'x'; allowed are"),
        ({"name": "vas", "guided": True, "beta": float("nan")}, "beta is nan"),
    ],
)
def test_rules_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_rule(**arguments)


def test_stop_texts_may_hold_line_breaks():
    assert unescape(r"a\n\tb") == "a\n\tb"
    assert unescape(r"\\n") == r"\n"
    assert unescape(r"C:\d") == r"C:\d"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4G", 4 << 30),
        ("1.5g", 3 << 29),
        ("512M", 512 << 20),
        ("64k", 64 << 10),
        ("1000000", 1_000_000),
        ("1", 1),
        ("0.5", 0.5),
        (None, None),
    ],
)
def test_memory(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "G", "4X", "-1", "0", "0G", "1.5", "nan", "infG", "4GB"])
def test_what_is_no_memory(text):
    with pytest.raises(ValueError, match=r"--kv-memory is .*allowed are sizes such as 4G"):
        parse_memory(text)
