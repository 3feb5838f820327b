"""What a study compares: methods, each a rule at several strengths, on the same prompts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from fastguide.config import Rule, check_strength
from fastguide.engine.text import Prompt
from fastguide.evaluate.judge import Judge
from fastguide.evaluate.stamps import stamp
from fastguide.models.loading import resolve_dtype
from fastguide.prompts import as_chat
from fastguide.request import SamplingParams

TAKEN = (
    *("prompt", "sample", "text", "token_ids", "prompt_tokens", "finish_reason", "seconds"),
    *("logprob", "log_ratio", "scored", "judge_seconds"),
    *("point", "method", "setting", "failed", "example", "runs"),
    *("policy_flops", "guide_flops", "judge_flops", "tokens_per_second", "seconds_per_response"),
)
"""Names of other fields, of a response or of a point's result."""

METRICS = ("reward", "kl", "tokens", "diversity", "coherence", "win_rate", "judged")
"""What a point may have estimates of; rewards besides these have the names the study gives them."""


@dataclass(frozen=True)
class Point:
    """One setting of a method.

    Attributes:
        method: the method's name.
        setting: what varies within the method: ``{"beta": 4.0}``.
        rule: how responses are sampled.
        weights: of the guides.
        sampling: temperature and length; its ``n`` is the responses per prompt.
        best_of: how many of them compete; 1 keeps all.
        policy: path, hub id or packaged name of another policy than the study's; None is that.

    Raises:
        ValueError: more compete than are sampled, or all of them are alike; a weight is none.
    """

    method: str
    setting: Mapping[str, Any]
    rule: Rule
    weights: Mapping[str, float]
    sampling: SamplingParams
    best_of: int = 1
    policy: str | None = None

    def __post_init__(self) -> None:
        n, most = self.best_of, self.sampling.n
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most:
            raise ValueError(
                f"{self.name} takes the best of {n!r}; allowed are whole numbers from 1 to {most}, "
                "the n of its sampling"
            )
        if n > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"{self.name} takes the best of {n} at temperature 0, where all are the same; "
                "allowed is more"
            )
        for guide, weight in self.weights.items():
            check_strength(f"{self.name}: the weight of guide {guide!r}", weight)

    @property
    def name(self) -> str:
        """``VAS beta=4``."""
        return " ".join([self.method, *(f"{k}={_short(v)}" for k, v in self.setting.items())])

    @property
    def draws(self) -> str:
        """What its responses depend on; points with the same share them."""
        parts = (self.rule, sorted(self.weights.items()), dataclasses.asdict(self.sampling))
        return json.dumps([repr(parts[0]), *parts[1:]], sort_keys=True)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        prompts: texts.
        points: all settings of all methods.
        policy: path, hub id or packaged name; None is the packaged model. KL is from it, also of
            points with another policy.
        guides: paths or packaged names, by name; ``reward:PATH`` is a reward model.
        reward: what guides were trained on and best-of-N searches for, as ``load_reward`` reads it.
        held_out: other rewards to report, by name: what the methods do not see.
        baseline: name of the point that win rates are against; None is none.
        coherence: path of an encoder, for coherence, or its ``path`` and ``pooling``; None leaves
            it out.
        judge: fields of ``Judge``; None asks nobody.
        dtype: of policy and guides; None is that of the policy's checkpoint.
        device: of policy and guides.
        max_rows: responses sampled together.
        chat: prompts are what a user says: the policy's chat template is put around each.
        trust_remote_code: run code shipped with policies, guides, classifiers and encoders.

    Raises:
        ValueError: naming the field, what it is and what is allowed.
    """

    prompts: Sequence[str]
    points: Sequence[Point]
    policy: str | None = None
    guides: Mapping[str, str] = field(default_factory=dict)
    reward: str | Sequence[str] = "cheerfulness"
    held_out: Mapping[str, str] = field(default_factory=dict)
    baseline: str | None = None
    coherence: str | Mapping[str, str] | None = None
    judge: Mapping[str, Any] | None = None
    dtype: str | None = None
    device: str | None = None
    max_rows: int = 64
    chat: bool = False
    trust_remote_code: bool = False

    @property
    def asked(self) -> list[Prompt]:
        """What engines are given: the prompts, or chats in which a user says them."""
        return [as_chat(text) if self.chat else text for text in self.prompts]

    @property
    def rewards(self) -> dict[str, str | Sequence[str]]:
        """The guiding reward and those held out, by name, as ``load_reward`` reads them."""
        return {"reward": self.reward, **self.held_out}

    @property
    def encoder(self) -> dict[str, Any]:
        """Arguments of ``Coherence``; none if it is left out."""
        if self.coherence is None or isinstance(self.coherence, str):
            return {"path": self.coherence} if self.coherence else {}
        return dict(self.coherence)

    @property
    def temperature(self) -> float:
        """Of the policy that KL is from: the baseline's, else the first above 0 of the points'."""
        ordered = sorted(self.points, key=lambda point: point.name != self.baseline)
        above = [p.sampling.temperature for p in ordered if p.sampling.temperature > 0]
        return above[0] if above else 1.0

    def summary(self) -> dict[str, Any]:
        """What was compared, for records: the study without its points, and versions."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del facts["points"]
        versions = {name: metadata.version(name) for name in ("fastguide", "torch", "transformers")}
        return facts | {"stamp": stamp(self.policy), "versions": versions}

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a study needs prompts, got none")
        if not self.points:
            raise ValueError("a study needs methods, got none")
        for name, (fits, allowed) in _FIELDS.items():
            if not fits(value := getattr(self, name)):
                raise ValueError(f"{name} is {value!r:.80}; allowed {allowed}")
        resolve_dtype(self.dtype)
        if odd := set(self.encoder) - {"path", "pooling"}:
            raise ValueError(f"coherence has {sorted(odd)[0]!r}; allowed are path, pooling")
        if self.coherence is not None and not _is_text(self.encoder.get("path")):
            raise ValueError(f"coherence is {self.coherence!r}; it needs the path of an encoder")
        if taken := sorted(set(self.held_out) & {*METRICS, *TAKEN}):
            raise ValueError(
                f"a held-out reward is called {taken[0]!r}, which means something else"
            )
        if self.judge is not None:
            made("judge", Judge, self.judge)
        names = [point.name for point in self.points]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the point {name!r} is there {names.count(name)} times")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline is {self.baseline!r}; there are {', '.join(names)}")
        for point in self.points:
            if point.rule.guided != any(point.weights.values()):
                takes = "needs a guide" if point.rule.guided else "takes no guide"
                raise ValueError(f"{point.name} {takes}, got {dict(point.weights) or 'none'}")
            for guide in point.weights:
                if guide not in self.guides:
                    have = ", ".join(self.guides) or "none"
                    raise ValueError(f"{point.name} has guide {guide!r}; the study has {have}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_reward(value: Any) -> bool:
    """A text, or several, for ``load_reward``."""
    return _is_text(value) or (
        isinstance(value, (list, tuple)) and bool(value) and all(map(_is_text, value))
    )


def _are_named(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def fit(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            _is_text(name) and fits(entry) for name, entry in value.items()
        )

    return fit


_MODEL = "is a path, a hub id or the name of a packaged model"
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "policy": (lambda value: value is None or _is_text(value), _MODEL),
    "guides": (_are_named(_is_text), "is a mapping of names to paths or names of packaged guides"),
    "reward": (_is_reward, "is a text, such as cheerfulness, or a list of texts"),
    "held_out": (_are_named(_is_reward), "is a mapping of names to rewards"),
    "coherence": (
        lambda value: value is None or _is_text(value) or isinstance(value, Mapping),
        "is the path of an encoder, or a mapping of path and pooling",
    ),
    "judge": (lambda value: value is None or isinstance(value, Mapping), "is a mapping"),
    "device": (lambda value: value is None or _is_text(value), "are cpu, cuda and cuda:N"),
    "max_rows": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
        "are whole numbers from 1",
    ),
    "chat": (lambda value: isinstance(value, bool), "are true and false"),
    "trust_remote_code": (lambda value: isinstance(value, bool), "are true and false"),
}
"""Which values of a study's fields are allowed, and how to say so."""


def made(where: str, dataclass_: type, given: Mapping[str, Any], *others: str) -> Any:
    """A dataclass of what was given.

    Args:
        where: what is given, for errors.
        dataclass_: to make.
        given: its fields.
        others: names that may stand beside its fields in a study's file.

    Raises:
        ValueError: a name is unknown or missing, or a value is not allowed.
    """
    fields = dataclasses.fields(dataclass_)
    allowed = {*(f.name for f in fields), *others}
    if odd := sorted(given.keys() - allowed, key=str):
        raise ValueError(f"{where} has {odd[0]!r}; allowed are {', '.join(sorted(allowed))}")
    needed = [f.name for f in fields if _required(f)]
    if lacking := [name for name in needed if name not in given]:
        raise ValueError(f"{where} lacks {lacking[0]!r}; it needs {', '.join(needed)}")
    try:
        return dataclass_(**given)
    except TypeError as error:
        raise ValueError(
            f"{where} is {dict(given)!r:.80}, with a value of the wrong type: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _required(field_: dataclasses.Field[Any]) -> bool:
    return field_.default is field_.default_factory is dataclasses.MISSING
