"""What a study compares: methods, each a rule at several strengths, on the same prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from fastguide.assets import resolve
from fastguide.config import ARGS, FUDGE, VAS, Plain, Rule
from fastguide.engine.text import Prompt
from fastguide.evaluate.judge import Judge
from fastguide.prompts import as_chat, read_file
from fastguide.request import SamplingParams

TAKEN = ("prompt", "sample", "text", "seconds", "prompt_tokens", "finish_reason", "log_ratio")
"""Names of a response's other fields."""

RULES: dict[str, type] = {"vas": VAS, "args": ARGS, "fudge": FUDGE, "none": Plain}
"""Rules by their name in a study; ``best-of`` is a method, too."""

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
    """

    method: str
    setting: Mapping[str, Any]
    rule: Rule
    weights: Mapping[str, float]
    sampling: SamplingParams
    best_of: int = 1
    policy: str | None = None

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
        if odd := set(self.encoder) - {"path", "pooling"}:
            raise ValueError(f"coherence has {sorted(odd)[0]!r}; allowed are path, pooling")
        if taken := sorted(set(self.held_out) & {*METRICS, *TAKEN}):
            raise ValueError(
                f"a held-out reward is called {taken[0]!r}, which means something else"
            )
        if self.judge is not None:
            _made("judge", Judge, self.judge)
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


def stamp(path: str | None) -> str:
    """What tells a model folder from the same folder with other weights; a hub id is itself."""
    folder = Path(resolve(str(path).removeprefix("reward:"))) if path else None
    if folder is None or not folder.is_dir():
        return str(path)
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
    return f"{path} {digest.hexdigest()}"


def stamp_reward(spec: str | Sequence[str]) -> str:
    """What tells a reward from one of the same name: a classifier's weights, a module's text."""
    specs = [spec] if isinstance(spec, str) else list(spec)
    return " + ".join(_stamp_part(text) for text in specs)


def _stamp_part(text: str) -> str:
    _, _, rest = text.rpartition("*") if "*" in text.partition(":")[0] else ("", "", text)
    kind, _, where = rest.partition(":")
    if kind == "classifier":
        path = where if Path(where).exists() else where.rpartition("?")[0] or where
        return f"{text} {stamp(path)}"
    if where and kind not in ("regex", "checker"):
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(kind)
            if found is not None and found.origin is not None and Path(found.origin).is_file():
                return f"{text} {hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()}"
    return text


_NAMES: dict[Any, str] = {
    bool: "are true and false",
    list: "is a list",
    dict: "is a mapping",
    (list, str): "is a list or the name of a file",
}
TYPES: dict[str, Any] = {
    "prompts": (list, str),
    "methods": list,
    "sampling": dict,
    "guides": dict,
    "held_out": dict,
    "judge": dict,
    "chat": bool,
}
"""What entries of a study file are."""


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
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read the study {str(path)!r}: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"the study {str(path)!r} must be a mapping of names")
    known = {f.name for f in dataclasses.fields(Study)} - {"points"} | {"methods", "sampling"}
    if unknown := sorted(set(raw) - known):
        raise ValueError(
            f"the study has the entry {unknown[0]!r}; allowed are {', '.join(sorted(known))}"
        )
    for name, kind in TYPES.items():
        if name in raw and not isinstance(raw[name], kind):
            raise ValueError(f"{name} is {raw[name]!r:.80}; allowed {_NAMES[kind]}")
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


def _made(where: str, dataclass_: type, given: Mapping[str, Any], *others: str) -> Any:
    """A dataclass of what was given; ``others`` are names that may stand beside its fields.

    Raises:
        ValueError: a name is unknown or missing, or a value is of another type.
    """
    allowed = {*(f.name for f in dataclasses.fields(dataclass_)), *others}
    if odd := sorted(given.keys() - allowed, key=str):
        raise ValueError(f"{where} has {odd[0]!r}; allowed are {', '.join(sorted(allowed))}")
    needed = [f.name for f in dataclasses.fields(dataclass_) if _required(f)]
    if lacking := [name for name in needed if name not in given]:
        raise ValueError(f"{where} lacks {lacking[0]!r}; it needs {', '.join(needed)}")
    try:
        return dataclass_(**given)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _required(field_: dataclasses.Field[Any]) -> bool:
    return field_.default is field_.default_factory is dataclasses.MISSING


def expand(method: Mapping[str, Any], base: Mapping[str, Any]) -> list[Point]:
    """The points of a method: what is a list in it varies, one after the other.

    Raises:
        ValueError: an unknown rule or setting.
    """
    given = dict(method)
    name = given.pop("name", None)
    kind = given.pop("rule", None if given.get("guide") else "none")
    if kind not in (*RULES, "best-of"):
        where = f" of the method {name!r}" if name else ""
        raise ValueError(f"rule{where} is {kind!r}; allowed are {', '.join([*RULES, 'best-of'])}")
    guide = given.pop("guide", None)
    policy = given.pop("policy", None)
    if not isinstance(guide, (str, Mapping, type(None))):
        raise ValueError(
            f"guide is {guide!r}; allowed are a name and a mapping of names to weights"
        )
    weights = {guide: 1.0} if isinstance(guide, str) else dict(guide or {})
    sampling = dict(base) | given.pop("sampling", {})
    swept = [key for key, value in given.items() if isinstance(value, list)]
    if len(swept) > 1:
        raise ValueError(
            f"the method {name or kind!r} varies {' and '.join(swept)}; allowed is one"
        )
    settings = [{}] if not swept else [{swept[0]: value} for value in given.pop(swept[0])]
    points = []
    for setting in settings:
        options = given | setting
        best_of = options.pop("n", 1) if kind == "best-of" else 1
        rule_class = Plain if kind == "best-of" else RULES[kind]
        where = f"the method {name or kind!r}"
        rule = _made(where, rule_class, options, "name", "rule", "guide", "policy", "sampling")
        params = _made(f"sampling of {where}", SamplingParams, sampling)
        if best_of > params.n:
            raise ValueError(
                f"{where} takes the best of {best_of}, but {params.n} "
                "responses are sampled; raise n of its sampling"
            )
        points.append(Point(name or kind, setting, rule, weights, params, best_of, policy))
    return points
