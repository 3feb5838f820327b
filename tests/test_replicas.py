"""Two engines in Ray on this machine give what one gives, also while they die."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from fastguide import (
    VAS,
    Engine,
    FunctionGuide,
    GenerationError,
    SamplingParams,
    ValueGuide,
)

ray: Any = pytest.importorskip("ray", reason="ray is not installed")
from fastguide.ray import Replicas  # noqa: E402

pytestmark = pytest.mark.slow

SAMPLING = SamplingParams(max_tokens=12, seed=3, n=2)
PROMPTS = ["Once upon a time", "The dog", "", "One day", "Tom and Lily", "A cat"]
RULE, WEIGHTS = VAS(beta=4.0), {"cheerful": 1.0}
FATAL = 1234
"""A token id: the guide of these tests kills its process when it sees it."""


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    ray.shutdown()  # of whoever used it before
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)

    def deadly(prefixes: Sequence[Sequence[int]]) -> list[float]:
        import os

        if any(FATAL in prefix for prefix in prefixes):
            os._exit(1)
        return [0.0] * len(prefixes)

    guides = {
        "cheerful": ValueGuide("cheerful"),
        "deadly": FunctionGuide(deadly, "tokens", batched=True),
    }
    with Replicas("stories", guides, replicas=2, gpus=0, dtype="float32") as both:
        yield both
    ray.shutdown()


@pytest.fixture(scope="module")
def alone() -> Engine:
    return Engine("stories", {"cheerful": ValueGuide("cheerful")}, device="cpu", dtype="float32")


def test_they_give_what_one_engine_gives(replicas: Replicas, alone: Engine) -> None:
    arguments = (PROMPTS, RULE, WEIGHTS, SAMPLING)
    mine = alone.generate(*arguments, errors="return")
    theirs = replicas.generate(*arguments, errors="return")
    assert [(c.prompt, c.sample, c.token_ids, c.text, c.error) for c in theirs] == [
        (c.prompt, c.sample, c.token_ids, c.text, c.error) for c in mine
    ]
    assert [c.error for c in mine if c.error] == [
        "prompt 2: the prompt is empty; allowed is one token or more"
    ]
    assert all(stats.tokens > 0 for stats in replicas.stats)  # both have worked
    with pytest.raises(GenerationError, match="prompt 2: the prompt is empty") as caught:
        replicas.generate(*arguments)
    assert len(caught.value.outputs) == len(theirs)


def test_streams(replicas: Replicas, alone: Engine) -> None:
    arguments = (PROMPTS[0], RULE, WEIGHTS, SAMPLING)
    pieces = list(replicas.stream(*arguments))
    for whole in alone.generate(*arguments):
        mine = [piece for piece in pieces if piece.sample == whole.sample]
        assert "".join(piece.text for piece in mine) == whole.text
    assert sum(piece.completion is not None for piece in pieces) == SAMPLING.n
    with pytest.raises(GenerationError, match="the prompt is empty"):
        list(replicas.stream(""))


def test_an_interrupt_keeps_what_was_done_and_stops_the_rest(replicas: Replicas) -> None:
    long = SamplingParams(max_tokens=200, seed=1)
    short = SamplingParams(max_tokens=1, seed=1)
    running = replicas.completions(["One day"] * 8, sampling=[short] + [long] * 7)
    assert next(running).prompt == 0
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt())
    after = replicas.generate("The dog", sampling=short)
    assert after[0].finish_reason == "length"
    assert all(stats.running <= 1 for stats in replicas.stats)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="replicas is 0; allowed are whole numbers from 1"):
        Replicas(replicas=0)
    with pytest.raises(ValueError, match="the cluster has"):
        Replicas(replicas=10_000)


def test_what_kills_a_replica_is_given_up_and_the_others_are_not_lost(
    replicas: Replicas, alone: Engine
) -> None:
    prompts = [[5, 9, FATAL if i == 3 else 40 + i] for i in range(8)]
    weights = [{"cheerful": 1.0, "deadly": 0.5} if i == 3 else WEIGHTS for i in range(8)]
    found = replicas.generate(prompts, RULE, weights, SAMPLING, errors="return")
    (lost,) = [c for c in found if c.error is not None]
    assert lost.prompt == 3
    assert "prompt 3: 3 replicas died with it" in str(lost.error)
    mine = alone.generate([p for i, p in enumerate(prompts) if i != 3], RULE, WEIGHTS, SAMPLING)
    assert [c.token_ids for c in found if c.prompt != 3] == [c.token_ids for c in mine]


def test_weights_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="no model at '/nowhere'"):
        Replicas("/nowhere", gpus=0, cpus=0)
