"""``--set`` and ``--sweep``: any setting of a configuration, by its name. No torch here."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any


def fields_of(config: type) -> set[str]:
    """What may be set of a configuration."""
    return {field.name for field in dataclasses.fields(config)} - {"output_dir"}


def configured(config: type, given: dict[str, Any]) -> Any:
    """The configuration.

    Raises:
        ValueError: in one sentence, whatever it objects to.
        ImportError: a logger is not installed.
    """
    from fastguide.models.loading import one_line
    from fastguide.train.settings import check_numbers

    check_numbers(config, given)
    try:
        return config(**given)
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except TypeError as error:
        raise ValueError(f"the settings make no {config.__name__}: {one_line(error)}") from error


def read_settings(texts: Sequence[str] | None, fields: set[str], option: str) -> dict[str, Any]:
    """Settings by name, from ``NAME=VALUE`` each; ``lr`` is short for ``learning_rate``.

    Args:
        texts: what was typed.
        fields: names that are allowed.
        option: the option's name, for messages.

    Raises:
        ValueError: a text or a name is another, or a name comes twice.
    """
    found: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        name = {"lr": "learning_rate"}.get(name, name)
        if not equals or name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            meant = near[0] if near else "gradient_accumulation_steps"
            raise ValueError(
                f"{option} is {text!r}; allowed is NAME=VALUE with a name of transformers' "
                f"TrainingArguments, such as {meant}"
            )
        if name in found:
            raise ValueError(f"{option} gives {name} more than once; allowed is once")
        found[name] = _literal(value)
    return found


def swept_values(value: Any) -> list[Any]:
    """``VALUE,VALUE``, what a sweep goes through."""
    if isinstance(value, tuple):
        return list(value)
    return [_literal(part) for part in str(value).split(",")]


def _literal(text: str) -> Any:
    """A number, True, False or None, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
