"""Studies from YAML files; ``docs/evaluate.md`` says what they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastguide.config import ARGS, FUDGE, VAS, Plain
from fastguide.evaluate.study import Point, Study, made
from fastguide.prompts import read_file
from fastguide.request import SamplingParams

RULES: dict[str, type] = {"vas": VAS, "args": ARGS, "fudge": FUDGE, "none": Plain}
"""Rules by their name in a study."""

_KINDS: dict[str, tuple[Any, str]] = {
    "prompts": ((list, str), "is a list or the name of a file"),
    "methods": (list, "is a list"),
    "sampling": (dict, "is a mapping"),
}
"""What entries of the file are that a study has in another form."""


def read_study(file: str | Path) -> Study:
    """A study from a YAML file; see ``docs/evaluate.md``.

    Raises:
        ValueError: the file cannot be read, or an entry is unknown or not allowed.
    """
    import yaml

    path = Path(file)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the study {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the study {str(path)!r}: it is not UTF-8 text") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read the study {str(path)!r}: {reason}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"the study {str(path)!r} must be a mapping of names")
    known = {f.name for f in dataclasses.fields(Study)} - {"points"} | {"methods", "sampling"}
    if unknown := sorted(set(raw) - known, key=str):
        raise ValueError(
            f"the study has the entry {unknown[0]!r}; allowed are {', '.join(sorted(known))}"
        )
    for name, (kind, allowed) in _KINDS.items():
        if name in raw and not isinstance(raw[name], kind):
            raise ValueError(f"{name} is {raw[name]!r:.80}; allowed {allowed}")
    prompts = raw.setdefault("prompts", [])
    if isinstance(prompts, str):
        raw["prompts"] = read_file(path.parent / prompts)
    elif odd := [p for p in prompts if not isinstance(p, str)]:
        raise ValueError(f"a prompt is {odd[0]!r}; allowed are texts: put it in quotes")
    if "reward" not in raw:
        raise ValueError("the study has no reward; for example reward: cheerfulness")
    base = raw.pop("sampling", {})
    methods = raw.pop("methods", [])
    points = [point for method in methods for point in expand(method, base)]
    return Study(points=points, **raw)


def expand(method: Mapping[str, Any], base: Mapping[str, Any]) -> list[Point]:
    """The points of a method: what is a list in it varies, one after the other.

    Raises:
        ValueError: an unknown rule or setting, or a value that is not allowed.
    """
    if not isinstance(method, Mapping):
        raise ValueError(
            f"a method is {method!r:.80}; allowed are mappings, such as {{name: plain, rule: none}}"
        )
    given = dict(method)
    name = given.pop("name", None)
    if not isinstance(name, (str, type(None))):
        raise ValueError(f"the name of a method is {name!r}; allowed are texts: put it in quotes")
    kind = given.pop("rule", None if given.get("guide") else "none")
    if kind not in RULES:
        where = f" of the method {name!r}" if name else ""
        raise ValueError(f"rule{where} is {kind!r}; allowed are {', '.join(RULES)}")
    where = f"the method {name or kind!r}"
    policy = given.pop("policy", None)
    if not isinstance(policy, (str, type(None))):
        raise ValueError(f"policy of {where} is {policy!r}; allowed are paths, hub ids and names")
    weights = _weights(where, given.pop("guide", None))
    own = given.pop("sampling", {})
    if not isinstance(own, Mapping):
        raise ValueError(f"sampling of {where} is {own!r}; allowed is a mapping")
    sampling = made(f"sampling of {where}", SamplingParams, {**base, **own})
    swept = [key for key, value in given.items() if isinstance(value, list)]
    if len(swept) > 1:
        raise ValueError(f"{where} varies {' and '.join(map(str, swept))}; allowed is one")
    values = [{key: value} for key in swept for value in given.pop(key)]
    if swept and not values:
        raise ValueError(f"{where} has an empty list of {swept[0]}; allowed are values")
    also = ("name", "rule", "guide", "policy", "sampling", "best_of")
    points = []
    for setting in values or [{}]:
        options = given | setting
        best_of = options.pop("best_of", 1)
        rule = made(where, RULES[kind], options, *also)
        points.append(Point(name or kind, setting, rule, weights, sampling, best_of, policy))
    return points


def _weights(where: str, guide: Any) -> dict[str, float]:
    """Weights of guides; one that is only named has 1."""
    if not isinstance(guide, (str, Mapping, type(None))):
        raise ValueError(
            f"guide of {where} is {guide!r}; allowed are a name and a mapping of names to weights"
        )
    return {guide: 1.0} if isinstance(guide, str) else dict(guide or {})
