"""Runs a study: samples, judges, and writes results, table and responses; continues if killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastguide import assets
from fastguide.engine import Engine
from fastguide.evaluate.judge import Judge, Pair
from fastguide.evaluate.metrics import Coherence, Estimate, diversity, win_rate
from fastguide.evaluate.reference import Reference
from fastguide.evaluate.study import Point, Study, stamp
from fastguide.guides import Guide, RewardGuide, ValueGuide
from fastguide.request import Completion, sample_seed
from fastguide.rewards import Reward, Sample, judge, load_reward
from fastguide.search import best_weights, kl_of_best

RESULTS_FILE = "results.json"
Row = dict[str, Any]
"""One response: prompt, sample, text, tokens, kl, seconds, rewards by name, and so on."""


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
        self._coherence = Coherence(study.coherence) if study.coherence else None

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

    def _reference(self) -> Reference:
        """The study's policy, to tell likelihoods."""
        if self._policy is None:
            path = self.study.policy or assets.MODEL
            self._policy = Reference(path, dtype=self.study.dtype, device=self.study.device)
        return self._policy

    def rewards(self) -> dict[str, Reward]:
        """The guiding reward and those held out."""
        if not self._rewards:
            specs = {"reward": self.study.reward, **self.study.held_out}
            self._rewards = {
                name: load_reward(spec, device=self.study.device) for name, spec in specs.items()
            }
        return self._rewards

    def run(self) -> list[dict[str, Any]]:
        """All points' results, which are also in ``results.json``."""
        results: list[dict[str, Any]] = []
        baseline = next((p for p in self.study.points if p.name == self.study.baseline), None)
        against = None if baseline is None else self.responses(baseline)
        for done, point in enumerate(self.study.points):
            self._told("points", done, len(self.study.points))
            rows = self.responses(point)
            results.append(self.result(point, rows, None if point is baseline else against))
            self._write(RESULTS_FILE, json.dumps(results, indent=1) + "\n")
        self._told("points", len(results), len(results))
        return results

    # ------------------------------------------------------------------------------ responses

    def responses(self, point: Point) -> list[Row]:
        """The judged responses of a point, sampled if they are not there."""
        rows = self._sampled(point)
        self._judge(rows)
        return rows

    def _sampled(self, point: Point) -> list[Row]:
        guides = sorted((name, stamp(self.study.guides[name])) for name in point.weights)
        policies = [stamp(self.study.policy), *([stamp(point.policy)] if point.policy else [])]
        settings = (point.draws, *policies, guides, self.study.dtype)
        identity = repr((*settings, list(self.study.prompts)))
        name = f"responses-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
        file = self.folder / name
        if not file.is_file():
            rows = self._sample(point)
            self._judge(rows)
            self._write(name, json.dumps(rows))
        found: list[Row] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _sample(self, point: Point) -> list[Row]:
        prompts = list(self.study.prompts)
        seed = point.sampling.seed or 0
        sampling = [
            dataclasses.replace(point.sampling, seed=sample_seed(seed, i + 1))
            for i in range(len(prompts))
        ]
        weights = dict(point.weights) or None
        outputs: list[Completion] = []
        started, rows = time.perf_counter(), []
        engine = self.engine(point.policy)
        for output in engine.completions(prompts, point.rule, weights, sampling):
            if output.error is not None:
                raise ValueError(f"{point.name}, prompt {output.prompt}: {output.error}")
            outputs.append(output)
            rows.append(
                {
                    "prompt": output.prompt,
                    "sample": output.sample,
                    "text": output.text,
                    "tokens": len(output.token_ids),
                    "prompt_tokens": output.prompt_tokens,
                    "finish_reason": output.finish_reason,
                    "kl": sum(output.kl),
                }
            )
            self._told(point.name, len(rows), len(prompts) * point.sampling.n)
        seconds = time.perf_counter() - started
        if point.policy is not None:
            temperature = point.sampling.temperature
            ratios = self._reference().log_ratios(outputs, prompts, engine.tokenizer, temperature)
            for row, ratio in zip(rows, ratios, strict=True):
                row["kl"] = ratio
        for row in rows:  # of the whole call: responses share their passes
            row["seconds"] = seconds / len(rows)
        return sorted(rows, key=lambda row: (row["prompt"], row["sample"]))

    def _judge(self, rows: list[Row]) -> None:
        """Add the rewards that are missing, and what else is measured of texts."""
        samples = [Sample(self.study.prompts[r["prompt"]], r["text"], r["tokens"]) for r in rows]
        for name, reward in self.rewards().items():
            if rows and (name not in rows[0] or rows[0].get(f"{name} by") != reward.name):
                for row, value in zip(rows, judge(reward, samples)[0], strict=True):
                    row[name], row[f"{name} by"] = value, reward.name
        if self._coherence is not None and rows and "coherence" not in rows[0]:
            prompts = [s.prompt for s in samples]
            cosines = self._coherence(prompts, [s.response for s in samples])
            for row, cosine in zip(rows, cosines, strict=True):
                row["coherence"] = cosine

    # -------------------------------------------------------------------------------- results

    def result(self, point: Point, rows: list[Row], against: list[Row] | None) -> dict[str, Any]:
        """Estimates of everything measured of a point."""
        best = point.best_of
        estimates: dict[str, Estimate] = {}
        names = [*self.rewards(), *(["coherence"] if self._coherence else [])]
        for name in names:
            estimates[name] = Estimate.of(_by_prompt(rows, name, best))
        for row in rows:
            row.setdefault("diversity", diversity(row["text"]))
        for name in ("tokens", "diversity"):
            estimates[name] = Estimate.of(_by_prompt(rows, name, best))
        if best > 1:
            estimates["kl"] = Estimate(kl_of_best(best), 0.0, len(rows))
        else:
            estimates["kl"] = Estimate.of(_by_prompt(rows, "kl", 1))  # none: another tokenizer
        if against is not None and best == 1:
            ours, theirs = _by_prompt(rows, "reward", 1), _by_prompt(against, "reward", 1)
            estimates["win_rate"] = win_rate(ours, theirs)
            if self.study.judge is not None:
                estimates["judged"] = self._judged(rows, against)
        tokens = sum(row["tokens"] for row in rows)
        seconds = sum(row["seconds"] for row in rows)
        return {
            "point": point.name,
            "method": point.method,
            "setting": dict(point.setting),
            "policy_flops": _policy_flops(self, point, rows),
            "guide_flops": _guide_flops(self, point, rows),
            "tokens_per_second": tokens / seconds / best if seconds else None,
            "seconds_per_response": best * seconds / len(rows),
            "example": rows[0]["text"],
            **{name: dataclasses.asdict(e) for name, e in estimates.items()},
        }

    def _judged(self, rows: list[Row], against: list[Row]) -> Estimate:
        """The share of prompts' first responses that a language model prefers to the baseline's."""
        assert self.study.judge is not None
        theirs = {row["prompt"]: row["text"] for row in against if row["sample"] == 0}
        ours = [row for row in rows if row["sample"] == 0 and row["prompt"] in theirs]
        pairs = [
            Pair(self.study.prompts[row["prompt"]], row["text"], theirs[row["prompt"]])
            for row in ours
        ]
        wins = Judge(**self.study.judge).wins(pairs)
        judged = zip(ours, wins, strict=True)
        return Estimate.of({row["prompt"]: [win] for row, win in judged if win is not None})

    def _write(self, name: str, text: str) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.folder / name)


def as_guide(path: str) -> Guide:
    """A guide of a study: ``reward:PATH`` is a reward model, anything else a guide folder."""
    kind, colon, rest = path.partition(":")
    return RewardGuide(rest) if colon and kind == "reward" else ValueGuide(path)


def _by_prompt(rows: Sequence[Row], name: str, best_of: int) -> Mapping[int, list[float]]:
    """A number of each response, by prompt; with best-of-N its expectation for the winner."""
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row[name] is not None and row["reward"] is not None:
            groups[row["prompt"]].append(row)
    if best_of == 1:
        return {prompt: [row[name] for row in group] for prompt, group in groups.items()}
    found = {}
    for prompt, group in groups.items():
        ranked = sorted(group, key=lambda row: row["reward"])
        shares = best_weights(len(ranked), min(best_of, len(ranked)))
        found[prompt] = [sum(s * row[name] for s, row in zip(shares, ranked, strict=True))]
    return found


def _policy_flops(runner: Runner, point: Point, rows: Sequence[Row]) -> float:
    """Of one answer: 2 per weight and token; the prompt is shared by the samples that compete."""
    weights = _weights(runner.engine(point.policy).runner.policy.model)
    tokens = statistics.fmean(row["tokens"] for row in rows)
    prompt = statistics.fmean(row["prompt_tokens"] for row in rows)
    return 2.0 * weights * (prompt + point.best_of * tokens)


def _guide_flops(runner: Runner, point: Point, rows: Sequence[Row]) -> float:
    """Of one answer: the prompt once, and k rows for every token."""
    tokens = statistics.fmean(row["tokens"] for row in rows)
    prompt = statistics.fmean(row["prompt_tokens"] for row in rows)
    total = 0.0
    for name, weight in point.weights.items():
        scorers = runner.engine(point.policy).runner.scorers
        decoder = getattr(scorers[name], "decoder", None)
        if weight and decoder is not None:
            total += 2.0 * _weights(decoder.model) * (prompt + point.rule.k * tokens)
    return total


def _weights(model: Any) -> int:
    """Weights that a token is multiplied with: all but looked-up embeddings."""
    every = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = head is not None and head.weight is embedding
    return every - (0 if tied else embedding.numel())
