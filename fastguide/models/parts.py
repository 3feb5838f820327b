"""Guides without a backbone of their own: a head, and perhaps a LoRA, on the policy's weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fastguide.assets import resolve
from fastguide.models.adapters import Factors, read_adapter
from fastguide.models.guide_config import GuideConfig
from fastguide.models.heads import MLPHead, ScalarHead, make_head
from fastguide.models.value import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    HEAD_FILE,
    find_base,
    load_state,
    local_folder,
)


class GuideParts(NamedTuple):
    """What such a guide adds to its base model."""

    base: str
    """The base model: a path or a hub id."""
    config: GuideConfig
    head: ScalarHead | MLPHead
    factors: dict[str, Factors] | None
    """Of its LoRA; None for a head on the states of the base model as they are."""


def load_parts(path: str | Path, base: str | Path | None, width: int) -> GuideParts | None:
    """The parts of a guide folder; None where the guide is more than that.

    Args:
        path: of the guide: local path, packaged name or hub id.
        base: its base model, if it is not the one that its config names.
        width: of the hidden states of the model that is to take the parts.

    Raises:
        ValueError: one sentence naming the file that is missing, corrupt or of wrong shape.
    """
    folder = local_folder(path)
    config = GuideConfig.load(folder)
    is_lora = (folder / ADAPTER_CONFIG_FILE).is_file()
    if not is_lora and not config.frozen:
        return None
    what = "LoRA" if is_lora else "head"
    source = resolve(base or find_base(path, what, config.base_model, folder))
    factors = read_adapter(folder, ADAPTER_CONFIG_FILE, ADAPTER_FILE) if is_lora else None
    if is_lora and factors is None:
        return None
    head = make_head(config.head, width)
    load_state(head, folder / HEAD_FILE)
    return GuideParts(source, config, head.eval().requires_grad_(False), factors)
