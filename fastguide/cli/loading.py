"""Load an engine for a command, without the libraries' own chatter."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastguide.assets import resolve
from fastguide.cli.arguments import GuideArgument
from fastguide.cli.live import status

if TYPE_CHECKING:
    from fastguide.engine import Engine
    from fastguide.guides import Guide


def load_engine(
    model: str | None,
    guides: Sequence[GuideArgument],
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Engine:
    """The engine of a command's options.

    Args:
        model: hub id, path or packaged name; None is the packaged model.
        guides: what ``--guide`` gave.
        device: as in ``Engine``.
        dtype: as in ``Engine``.
        trust_remote_code: as in ``Engine``.

    Raises:
        ValueError: for anything that is missing, corrupt or does not fit together.
    """
    with status("loading"), _quiet():
        from fastguide.engine import Engine

        loaded: Mapping[str, Guide] = {guide.name: _guide(guide.path) for guide in guides}
        return Engine(
            model, loaded, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own loading bars and warnings out of a command's output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _guide(path: str) -> Guide:
    """A value guide where the folder says so, else a reward guide (a sequence classifier)."""
    from fastguide.guides import RewardGuide, ValueGuide

    return ValueGuide(path) if _is_value_guide(path) else RewardGuide(path)


def _is_value_guide(path: str) -> bool:
    from fastguide.models.guide_config import CONFIG_FILE

    folder = Path(resolve(path))
    if folder.is_dir():
        return (folder / CONFIG_FILE).is_file() or not (folder / "config.json").is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        hf_hub_download(path, CONFIG_FILE)
    except (HFValidationError, OSError) as error:
        found_none = isinstance(error, EntryNotFoundError)
        if found_none and not isinstance(error, LocalEntryNotFoundError):
            return False  # the repository is there, the file is not
        raise ValueError(
            f"no guide at {path!r}: neither a folder nor a hub id that can be fetched"
        ) from error
    return True
