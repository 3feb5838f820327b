"""Load an engine for a command, without the libraries' own chatter."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastguide import assets
from fastguide.cli.arguments import GuideArgument
from fastguide.cli.live import status

if TYPE_CHECKING:
    from fastguide.engine import Engine
    from fastguide.guides import Guide


def load_engine(
    model: str | None,
    guides: Sequence[GuideArgument],
    *,
    guide_base: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    **how: Any,
) -> Engine:
    """The engine of a command's options.

    Args:
        model: hub id, path or packaged name; None is the packaged model.
        guides: what ``--guide`` gave.
        guide_base: base model of those guides that are a LoRA and not packaged.
        device: as in ``Engine``.
        dtype: see ``chosen_dtype``.
        trust_remote_code: as in ``Engine``.
        how: further arguments of ``Engine``.

    Raises:
        ValueError: for anything that is missing, corrupt or does not fit together.
    """
    with status("loading"), quiet():
        from fastguide.engine import Engine

        loaded: Mapping[str, Guide] = {g.name: _guide(g.path, guide_base) for g in guides}
        return Engine(
            model,
            loaded,
            device=device,
            dtype=chosen_dtype(model, dtype),
            trust_remote_code=trust_remote_code,
            **how,
        )


def chosen_dtype(model: str | None, dtype: str | None) -> str | None:
    """As in ``Engine``; but None is float32 for the packaged model: exact seeds cost nothing."""
    return "float32" if dtype is None and model in (None, assets.MODEL) else dtype


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own loading bars and warnings out of a command's output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _guide(path: str, base: str | None) -> Guide:
    """A value guide where the folder says so, else a reward guide (a sequence classifier)."""
    from fastguide.guides import RewardGuide, ValueGuide
    from fastguide.models.guide_config import CONFIG_FILE
    from fastguide.models.locate import MODEL_FILE, holds

    if path in assets.names():
        return ValueGuide(path)
    if holds(path, CONFIG_FILE, "guide") or not holds(path, MODEL_FILE, "guide"):
        return ValueGuide(path, base=base)
    return RewardGuide(path)
