"""From what was typed to plain data: guides, rule, prompts. No torch here."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastguide import assets
from fastguide.config import ARGS, FUDGE, VAS, Plain, Rule
from fastguide.prompts import read_file, read_lines

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


@dataclass(frozen=True)
class GuideArgument:
    """One ``--guide``: what to call it, where it is, how much it counts."""

    name: str
    path: str
    weight: float = 1.0


def parse_guide(text: str) -> GuideArgument:
    r"""Read ``NAME[:WEIGHT]`` of a packaged guide or ``NAME=PATH[:WEIGHT]``.

    The weight is a trailing number after a colon, so that ``C:\models`` and hub ids keep theirs;
    a path that exists as it stands is taken whole.

    Raises:
        ValueError: for a name that is not packaged, an empty name or path, or a weight that is no
            number, after a packaged name or a path that exists.
    """
    name, equals, path = text.partition("=")
    target, weight = _split_weight(path if equals else name)
    if not equals:
        if target not in assets.guides():
            raise ValueError(
                f"unknown guide {target!r}; packaged guides are {', '.join(assets.guides())}, "
                "others are given as NAME=PATH"
            )
        return GuideArgument(target, target, weight)
    if not name.strip() or not target:
        raise ValueError(f"guide is {text!r}; allowed are NAME[:WEIGHT] and NAME=PATH[:WEIGHT]")
    return GuideArgument(name.strip(), target, weight)


def _split_weight(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition(":")
    if not path or Path(text).exists():
        return text, 1.0
    if _NUMBER.fullmatch(weight):
        return path, float(weight)
    if path in assets.names() or Path(path).exists():
        raise ValueError(f"weight of guide {path!r} is {weight!r}; allowed are numbers")
    return text, 1.0


def parse_guides(texts: Sequence[str]) -> list[GuideArgument]:
    """All ``--guide`` options.

    Raises:
        ValueError: as ``parse_guide``, and for a name that comes twice.
    """
    guides = [parse_guide(text) for text in texts]
    names = [guide.name for guide in guides]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"guide {name!r} is given {names.count(name)} times; allowed is once")
    return guides


def build_rule(
    name: str | None,
    guided: bool,
    *,
    beta: float | None = None,
    weight: float | None = None,
    k: int | None = None,
    fill: str | None = None,
    candidate_mass: float | None = None,
    form: str | None = None,
) -> Rule:
    """The rule of the options that were given; None stands for an option left out.

    Args:
        name: a rule; None is ``vas`` with guides, ``none`` without.
        guided: whether any guide is given.
        beta: strength, of VAS.
        weight: strength, of ARGS and FUDGE.
        k: how many tokens are scored.
        fill: of VAS.
        candidate_mass: of the base distribution, that scored tokens must hold.
        form: of ARGS.

    Raises:
        ValueError: for an unknown rule, a rule without a guide or a guide without a rule, an
            option of another rule or a value that is not allowed.
    """
    chosen = name or ("vas" if guided else "none")
    takes = {
        "vas": ("beta", "k", "fill", "candidate_mass"),
        "args": ("weight", "k", "form", "candidate_mass"),
        "fudge": ("weight", "k", "candidate_mass"),
        "none": (),
    }
    if chosen not in takes:
        raise ValueError(f"rule is {chosen!r}; allowed are {', '.join(takes)}")
    options = {"beta": beta, "weight": weight, "k": k, "fill": fill, "form": form}
    options["candidate_mass"] = candidate_mass
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in takes[chosen]:
            reason = f"rule is {chosen!r}" if name else "no --guide is given"
            users = [rule for rule, keys in takes.items() if key in keys]
            flag = key.replace("_", "-")
            raise ValueError(
                f"--{flag} is given, but {reason}; allowed with rule {' or '.join(users)}"
            )
    if chosen == "none":
        if guided:
            raise ValueError(
                "--guide is given, but rule is 'none'; allowed with rule vas, args or fudge"
            )
        return Plain()
    if not guided:
        raise ValueError(
            f"rule is {chosen!r}, but no guide is given; add --guide, such as --guide cheerful"
        )
    rules: dict[str, type[VAS | ARGS | FUDGE]] = {"vas": VAS, "args": ARGS, "fudge": FUDGE}
    return rules[chosen](**given)  # type: ignore[arg-type]


def read_prompts(arguments: Sequence[str], source: str | None) -> list[str]:
    """Prompts from arguments, then from a file or standard input, one per line.

    Standard input is read for ``-``, or where it is piped and nothing else is given.

    Args:
        arguments: as typed; ``-`` stands for standard input.
        source: a file, ``-``, or None.

    Raises:
        ValueError: when there is no prompt, or a file cannot be read.
    """
    prompts = [argument for argument in arguments if argument != "-"]
    piped = not arguments and source is None and not sys.stdin.isatty()
    if "-" in arguments or source == "-" or piped:
        prompts += read_lines(sys.stdin.buffer.read(), "standard input")
    if source is not None and source != "-":
        prompts += read_file(source)
    if not prompts:
        raise ValueError("no prompt is given; type one, or use --input FILE or standard input")
    return prompts


def parse_memory(text: str | None) -> int | float | None:
    """Bytes of ``4G``, ``512M`` or a number, or a share of the free memory; None for None.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return None
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        number = float(digits)
    except ValueError:
        number = 0.0
    if unit in units and 1 <= number * units[unit] < float("inf"):
        return int(number * units[unit])
    if not unit and 0 < number < 1:
        return number
    if not unit and number.is_integer() and number >= 1:
        return int(number)
    raise ValueError(
        f"--kv-memory is {text!r}; allowed are sizes such as 4G, 512M or 1000000 (bytes), and "
        "shares of the free memory above 0 and below 1"
    )


def unescape(text: str) -> str:
    r"""Turn ``\n``, ``\t`` and ``\\`` into the characters they mean, as shells do not."""
    return re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], text)
