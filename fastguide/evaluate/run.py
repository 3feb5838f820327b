"""Runs a study: samples, measures, and writes results and responses; continues if killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastguide import assets
from fastguide.engine import Engine
from fastguide.evaluate import estimates, sampling
from fastguide.evaluate.differences import Measured
from fastguide.evaluate.estimates import Row
from fastguide.evaluate.judge import Judge, Pair
from fastguide.evaluate.metrics import Coherence, Estimate
from fastguide.evaluate.reference import Reference
from fastguide.evaluate.stamps import stamp, stamp_reward
from fastguide.evaluate.study import Point, Study
from fastguide.files import Draft, replacing
from fastguide.guides import Guide, RewardGuide, ValueGuide
from fastguide.models.loading import resolve_device
from fastguide.rewards import Reward, Sample, judge_or_raise, load_reward

RESULTS_FILE = "results.json"
FORMAT_VERSION = 3


class Runner:
    """A study in its folder.

    Args:
        study: what to compare.
        folder: of responses and results; one that was begun continues.
        on_progress: told (what, done, of).

    Raises:
        ValueError: a reward, the encoder or the device cannot be had.
    """

    def __init__(
        self,
        study: Study,
        folder: str | Path,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.study, self.folder = study, Path(folder)
        self._told = on_progress or (lambda what, done, of: None)
        self._engines: dict[str | None, Engine] = {}
        self._policy: Reference | None = None
        self._how: dict[str, Any] = {
            "device": study.device,
            "trust_remote_code": study.trust_remote_code,
        }
        resolve_device(study.device)
        self.rewards = {name: self._reward(name, spec) for name, spec in study.rewards.items()}
        self._coherence = Coherence(**study.encoder, **self._how) if study.encoder else None
        self.folder.mkdir(parents=True, exist_ok=True)

    def _reward(self, name: str, spec: str | Sequence[str]) -> Reward:
        try:
            return load_reward(spec, **self._how)
        except ValueError as error:
            where = "" if name == "reward" else f"held_out {name!r}: "
            raise ValueError(f"{where}{error}") from error

    def engine(self, policy: str | None = None) -> Engine:
        """The engine of a point's policy, with the guides of its points; loaded when needed."""
        if policy not in self._engines:
            points = [point for point in self.study.points if point.policy == policy]
            used = {guide for point in points for guide in point.weights}
            self._engines[policy] = Engine(
                policy or self.study.policy,
                {n: as_guide(path) for n, path in self.study.guides.items() if n in used},
                dtype=self.study.dtype,
                max_rows=self.study.max_rows,
                **self._how,
            )
        return self._engines[policy]

    def run(self) -> list[dict[str, Any]]:
        """All points' results, which are then in ``results.json``, with what was compared.

        Everything is loaded and checked before anything is sampled.

        Raises:
            ValueError: a model cannot be loaded, a point cannot be sampled, or more than 5 % of a
                point's responses cannot be measured.
        """
        for policy in dict.fromkeys(point.policy for point in self.study.points):
            points = [point for point in self.study.points if point.policy == policy]
            sampling.check(self.engine(policy), points, self.study.asked)
        results: list[dict[str, Any]] = []
        baseline = next((p for p in self.study.points if p.name == self.study.baseline), None)
        for done, point in enumerate(self.study.points):
            self._told("points", done, len(self.study.points))
            results.append(self.result(point, None if point is baseline else baseline))
        record = {"study": self.study.summary(), "points": results}
        self._write(RESULTS_FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")
        self._told("points", len(results), len(results))
        return results

    # ------------------------------------------------------------------------------ responses

    def responses(self, point: Point) -> list[Row]:
        """The measured responses of a point; what of them is in the folder is not made again."""
        found = self._read(point)
        if found is None:
            draft = self._draft(self._file(point))
            found = self._sample(point, draft), {}
            self._keep(point, *found)  # whatever happens to what measures
            draft.drop()
        rows, measures = found
        self._measure(point, rows, measures)
        return rows

    def frontier(self, method: str, *, y: str = "reward") -> list[Measured]:
        """KL and a reward of each point of a method, prompt by prompt: for ``differences``."""
        points = [point for point in self.study.points if point.method == method]
        return [estimates.kl_and_reward(self.responses(p), p.best_of, y) for p in points]

    def _file(self, point: Point) -> str:
        """Named by everything that the responses depend on."""
        study = self.study
        guides = sorted((name, stamp(study.guides[name])) for name in point.weights)
        policies = [stamp(study.policy), *([stamp(point.policy)] if point.policy else [])]
        settings = (FORMAT_VERSION, point.draws, *policies, guides, study.dtype, study.temperature)
        identity = repr((*settings, study.asked))
        return f"responses-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"

    def _read(self, point: Point) -> tuple[list[Row], dict[str, str]] | None:
        file = self.folder / self._file(point)
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return found["rows"], found["measures"]

    def _keep(self, point: Point, rows: list[Row], measures: dict[str, str]) -> None:
        """The rows, and by which reward or model each of their measures was made."""
        self._write(self._file(point), json.dumps({"measures": measures, "rows": rows}))

    def _draft(self, file: str) -> Draft:
        return Draft((self.folder / file).with_suffix(".draft.jsonl"))

    def _sample(self, point: Point, draft: Draft) -> list[Row]:
        engine, prompts = self.engine(point.policy), self.study.asked
        of = len(prompts) * point.sampling.n
        rows = sampling.sample(
            engine, point, prompts, draft, lambda done: self._told(point.name, done, of)
        )
        if point.policy is not None or point.sampling.temperature != self.study.temperature:
            ratios = self._reference().log_ratios(
                rows,
                prompts,
                engine.tokenizer,
                self.study.temperature,
                greedy=point.sampling.temperature == 0,
            )
            for row, ratio in zip(rows, ratios, strict=True):
                row["kl"] = row["log_ratio"] = ratio
        return rows

    def _reference(self) -> Reference:
        """The study's policy, to tell likelihoods."""
        if self._policy is None:
            path = self.study.policy or assets.MODEL
            self._policy = Reference(path, dtype=self.study.dtype, **self._how)
        return self._policy

    def _measure(self, point: Point, rows: list[Row], measures: dict[str, str]) -> None:
        """Add and keep what is missing, or was measured by something else."""
        samples = [Sample(self.study.prompts[r["prompt"]], r["text"], r["tokens"]) for r in rows]
        for name, reward in self.rewards.items():
            if measures.get(name) != (by := stamp_reward(self.study.rewards[name])):
                started = time.perf_counter()
                values, _ = judge_or_raise(reward, samples, lambda i: _where(point, rows[i]))
                seconds = (time.perf_counter() - started) / len(rows)
                for row, value in zip(rows, values, strict=True):
                    row[name] = value
                    if name == "reward":
                        row["judge_seconds"] = seconds
                measures[name] = by
                self._keep(point, rows, measures)
        if self._coherence is not None:
            by = f"{stamp(self.study.encoder['path'])} {self.study.encoder.get('pooling')}"
            if measures.get("coherence") != by:
                prompts, texts = [s.prompt for s in samples], [s.response for s in samples]
                for row, cosine in zip(rows, self._coherence(prompts, texts), strict=True):
                    row["coherence"] = cosine
                measures["coherence"] = by
                self._keep(point, rows, measures)

    # -------------------------------------------------------------------------------- results

    def result(self, point: Point, baseline: Point | None) -> dict[str, Any]:
        """Estimates of everything measured of a point; ``baseline`` is for win rates."""
        rows = self.responses(point)
        ours = estimates.shares(rows, point.best_of)
        names = [*self.rewards, *(["coherence"] if self._coherence else [])]
        found = {name: estimates.mean(ours, name) for name in (*names, "tokens", "diversity")}
        found["kl"] = estimates.kl(ours, point.best_of)
        if baseline is not None:
            against = self.responses(baseline)
            found["win_rate"] = estimates.wins(ours, estimates.shares(against, baseline.best_of))
            if self.study.judge is not None:
                found["judged"] = self._judged(point, rows, baseline, against)
        scorers = self.engine(point.policy).runner.scorers
        used = [scorers[name] for name, weight in point.weights.items() if weight]
        costs = estimates.costs(
            rows,
            point.best_of,
            self.engine(point.policy).runner.policy.weights,
            [s.decoder.body_weights for s in used if hasattr(s, "decoder")],
            estimates.reward_weights(self.rewards["reward"]),
        )
        return {
            "point": point.name,
            "method": point.method,
            "setting": dict(point.setting),
            **dict(costs),
            "failed": sum(row[name] is None for row in rows for name in self.rewards),
            "example": rows[0]["text"],
            **{name: dataclasses.asdict(estimate) for name, estimate in found.items()},
        }

    def _judged(
        self, point: Point, rows: list[Row], baseline: Point, against: list[Row]
    ) -> Estimate:
        """The share of prompts whose answer a language model prefers to the baseline's."""
        assert self.study.judge is not None
        ours = estimates.answers(rows, point.best_of)
        theirs = estimates.answers(against, baseline.best_of)
        asked = sorted(ours.keys() & theirs.keys())
        pairs = [
            Pair(self.study.prompts[prompt], ours[prompt]["text"], theirs[prompt]["text"])
            for prompt in asked
        ]
        judge = Judge(**{"chat": self.study.chat, **self.study.judge})
        identity = json.dumps([judge.identity, pairs])
        name = f"judged-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
        file = self.folder / name
        if not file.is_file():
            told, draft = len(pairs), self._draft(name)
            wins = judge.wins(
                pairs, lambda done: self._told(f"{point.name}, judged", done, told), draft
            )
            self._write(name, json.dumps(wins))
            draft.drop()
        wins = json.loads(file.read_text(encoding="utf-8"))
        judged = zip(asked, wins, strict=True)
        return Estimate.of({prompt: [win] for prompt, win in judged if win is not None})

    def _write(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as part:
            part.write_text(text, encoding="utf-8")


def as_guide(path: str) -> Guide:
    """A guide of a study: ``reward:PATH`` is a reward model, anything else a guide folder."""
    kind, colon, rest = path.partition(":")
    return RewardGuide(rest) if colon and kind == "reward" else ValueGuide(path)


def _where(point: Point, row: Row) -> str:
    return f"{point.name}, prompt {row['prompt']}, sample {row['sample']}"
