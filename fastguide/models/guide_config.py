"""What a guide folder says about itself: ``guide_config.json``."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CONFIG_FILE = "guide_config.json"
FORMAT_VERSION = 1
KINDS = ("value", "classifier")


@dataclasses.dataclass(frozen=True)
class RewardScale:
    """The reward a guide predicts, in units of the unguided rollouts: ``(raw - mean) / std``.

    ``per_token``: the reward is paid token by token instead of at the end, and a value is what is
    still to come (see ``ValueModel.forward``).
    """

    name: str = "reward"
    mean: float = 0.0
    std: float = 1.0
    per_token: bool = False

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"reward std must be above 0, got {self.std}")

    @classmethod
    def of(cls, name: str, raw: Sequence[float], *, per_token: bool = False) -> RewardScale:
        """The scale of raw rewards.

        Raises:
            ValueError: they do not vary.
        """
        if len(raw) < 2 or max(raw) == min(raw):
            seen = f"is {raw[0]:g} for all {len(raw)}" if len(raw) > 1 else "is of fewer than 2"
            raise ValueError(f"the reward {name!r} {seen} responses; a guide needs what varies")
        return cls(name, statistics.fmean(raw), statistics.pstdev(raw), per_token)

    def standardise(self, raw: Iterable[float]) -> list[float]:
        """``(raw - mean) / std``."""
        return [(value - self.mean) / self.std for value in raw]


@dataclasses.dataclass(frozen=True)
class GuideConfig:
    """Contents of ``guide_config.json``.

    ``base_model`` is a hub id, an absolute path or a path relative to the guide folder. ``lam``
    is written as ``lambda``. ``training`` holds free facts about how the guide was made. ``kind``
    says what the numbers are: values (VAS), or the logits of a prefix classifier (FUDGE). With
    ``frozen`` the backbone is the base model as it is.
    """

    base_model: str
    reward: RewardScale = RewardScale()
    gamma: float = 1.0
    lam: float = 0.95
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "value"
    head: str = "linear"
    frozen: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "head": self.head,
            "frozen": self.frozen,
            "base_model": self.base_model,
            "reward": dataclasses.asdict(self.reward),
            "gamma": self.gamma,
            "lambda": self.lam,
            "training": self.training,
        }

    @classmethod
    def load(cls, folder: Path) -> GuideConfig:
        """Read a folder's config; ValueError names the file and what is wrong with it."""
        file = folder / CONFIG_FILE
        if not file.is_file():
            raise ValueError(f"no guide at {folder}: the file {CONFIG_FILE} is missing")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{file} must hold a JSON object, got {type(raw).__name__}")
        allowed = set(cls("").to_dict())
        if unknown := sorted(set(raw) - allowed):
            raise ValueError(f"{file} has unknown keys {unknown}; allowed are {sorted(allowed)}")
        if raw.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format_version {raw.get('format_version')!r}; "
                f"this version reads {FORMAT_VERSION}"
            )
        if raw.get("kind") not in KINDS:
            raise ValueError(f"{file} has kind {raw.get('kind')!r}; allowed are {', '.join(KINDS)}")
        if not isinstance(raw.get("base_model"), str):
            raise ValueError(f"{file} must name its base_model, got {raw.get('base_model')!r}")
        try:
            reward = RewardScale(**raw.get("reward", {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} has a bad reward entry: {error}") from error
        return cls(
            base_model=raw["base_model"],
            reward=reward,
            gamma=float(raw.get("gamma", 1.0)),
            lam=float(raw.get("lambda", 0.95)),
            kind=raw["kind"],
            head=raw.get("head", "linear"),
            frozen=bool(raw.get("frozen", False)),
            training=raw.get("training", {}),
        )

    def save(self, folder: Path) -> None:
        """Write ``guide_config.json`` into ``folder``."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
