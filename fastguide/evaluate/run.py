"""Runs a study: samples, judges, and writes results and responses; continues if killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastguide import assets
from fastguide.engine import Engine
from fastguide.evaluate import estimates
from fastguide.evaluate.estimates import Row
from fastguide.evaluate.judge import Judge, Pair
from fastguide.evaluate.metrics import Coherence, Estimate, diversity
from fastguide.evaluate.reference import Reference
from fastguide.evaluate.study import Point, Study, stamp, stamp_reward
from fastguide.guides import Guide, RewardGuide, ValueGuide
from fastguide.request import Completion, sample_seed
from fastguide.rewards import Reward, Sample, judge_or_raise, load_reward

RESULTS_FILE = "results.json"
FORMAT_VERSION = 3
WARM_UP = 2
"""Tokens that are sampled before the clock starts."""


class Runner:
    """A study in its folder.

    Args:
        study: what to compare.
        folder: of responses and results; one that was begun continues.
        on_progress: told (what, done, of).
    """

    def __init__(
        self,
        study: Study,
        folder: str | Path,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.study, self.folder = study, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._told = on_progress or (lambda what, done, of: None)
        self._engines: dict[str | None, Engine] = {}
        self._policy: Reference | None = None
        self._rewards: dict[str, Reward] = {}
        self._coherence = Coherence(**study.encoder) if study.encoder else None

    def engine(self, policy: str | None = None) -> Engine:
        """The engine of a point's policy, with the guides of its points; loaded when needed."""
        if policy not in self._engines:
            points = [point for point in self.study.points if point.policy == policy]
            used = {guide for point in points for guide in point.weights}
            self._engines[policy] = Engine(
                policy or self.study.policy,
                {n: as_guide(path) for n, path in self.study.guides.items() if n in used},
                dtype=self.study.dtype,
                device=self.study.device,
                max_rows=self.study.max_rows,
            )
        return self._engines[policy]

    def rewards(self) -> dict[str, Reward]:
        """The guiding reward and those held out."""
        if not self._rewards:
            self._rewards = {
                name: load_reward(spec, device=self.study.device)
                for name, spec in self.study.rewards.items()
            }
        return self._rewards

    def run(self) -> list[dict[str, Any]]:
        """All points' results, which are then in ``results.json``, with what was compared.

        Raises:
            ValueError: more than 5 % of a point's responses cannot be judged.
        """
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
        """The judged responses of a point; what of them is in the folder is not made again."""
        found = self._read(point)
        if found is None:
            found = self._sample(point), {}
            self._keep(point, *found)  # whatever happens to those who judge
        rows, measures = found
        known = dict(measures)
        self._judge(point, rows, measures)
        if measures != known:
            self._keep(point, rows, measures)
        return rows

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

    def _sample(self, point: Point) -> list[Row]:
        prompts = self.study.asked
        seed = point.sampling.seed or 0
        sampling = [
            dataclasses.replace(point.sampling, seed=sample_seed(seed, i + 1))
            for i in range(len(prompts))
        ]
        weights, engine = dict(point.weights) or None, self.engine(point.policy)
        warm_up = dataclasses.replace(point.sampling, n=1, max_tokens=WARM_UP)
        list(engine.completions(prompts[:1], point.rule, weights, warm_up))
        outputs: list[Completion] = []
        started = time.perf_counter()
        for output in engine.completions(prompts, point.rule, weights, sampling):
            if output.error is not None:
                raise ValueError(f"{point.name}, prompt {output.prompt}: {output.error}")
            outputs.append(output)
            self._told(point.name, len(outputs), len(prompts) * point.sampling.n)
        seconds = time.perf_counter() - started
        outputs.sort(key=lambda output: (output.prompt, output.sample))
        rows = [
            {
                "prompt": output.prompt,
                "sample": output.sample,
                "text": output.text,
                "tokens": len(output.token_ids),
                "prompt_tokens": output.prompt_tokens,
                "finish_reason": output.finish_reason,
                "kl": sum(output.kl),
                "log_ratio": sum(output.logprobs) - sum(output.base_logprobs),
                "seconds": seconds / len(outputs),  # of the whole call: they share their passes
                "diversity": diversity(output.text),
            }
            for output in outputs
        ]
        if point.policy is not None or point.sampling.temperature != self.study.temperature:
            ratios = self._reference().log_ratios(
                outputs,
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
            self._policy = Reference(path, dtype=self.study.dtype, device=self.study.device)
        return self._policy

    def _judge(self, point: Point, rows: list[Row], measures: dict[str, str]) -> None:
        """Add what is missing, or was measured by something else."""
        samples = [Sample(self.study.prompts[r["prompt"]], r["text"], r["tokens"]) for r in rows]
        for name, reward in self.rewards().items():
            if measures.get(name) != (by := stamp_reward(self.study.rewards[name])):
                started = time.perf_counter()
                values, _ = judge_or_raise(reward, samples, lambda i: _where(point, rows[i]))
                seconds = (time.perf_counter() - started) / len(rows)
                for row, value in zip(rows, values, strict=True):
                    row[name] = value
                    if name == "reward":
                        row["judge_seconds"] = seconds
                measures[name] = by
        if self._coherence is not None:
            by = f"{stamp(self.study.encoder['path'])} {self.study.encoder.get('pooling')}"
            if measures.get("coherence") != by:
                prompts, texts = [s.prompt for s in samples], [s.response for s in samples]
                for row, cosine in zip(rows, self._coherence(prompts, texts), strict=True):
                    row["coherence"] = cosine
                measures["coherence"] = by

    # -------------------------------------------------------------------------------- results

    def result(self, point: Point, baseline: Point | None) -> dict[str, Any]:
        """Estimates of everything measured of a point; ``baseline`` is for win rates."""
        rows = self.responses(point)
        ours = estimates.shares(rows, point.best_of)
        names = [*self.rewards(), *(["coherence"] if self._coherence else [])]
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
            estimates.weights_of(self.engine(point.policy).runner.policy.model),
            [estimates.weights_of(s.decoder.model) for s in used if hasattr(s, "decoder")],
            point.rule.k,
            estimates.judging_weights(self.rewards()["reward"]),
        )
        return {
            "point": point.name,
            "method": point.method,
            "setting": dict(point.setting),
            **dict(costs),
            "failed": sum(row[name] is None for row in rows for name in self.rewards()),
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
        identity = json.dumps([dict(self.study.judge), pairs], sort_keys=True)
        name = f"judged-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
        file = self.folder / name
        if not file.is_file():
            told = len(pairs)
            wins = Judge(**self.study.judge).wins(
                pairs, lambda done: self._told(f"{point.name}, judged", done, told)
            )
            self._write(name, json.dumps(wins))
        wins = json.loads(file.read_text(encoding="utf-8"))
        judged = zip(asked, wins, strict=True)
        return Estimate.of({prompt: [win] for prompt, win in judged if win is not None})

    def _write(self, name: str, text: str) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.folder / name)


def as_guide(path: str) -> Guide:
    """A guide of a study: ``reward:PATH`` is a reward model, anything else a guide folder."""
    kind, colon, rest = path.partition(":")
    return RewardGuide(rest) if colon and kind == "reward" else ValueGuide(path)


def _where(point: Point, row: Row) -> str:
    return f"{point.name}, prompt {row['prompt']}, sample {row['sample']}"
