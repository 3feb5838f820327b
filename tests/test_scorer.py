"""The scorer without the engine: what a serving stack would call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fastguide import TreeScorer, ValueGuide
from fastguide.guides import LoadContext
from fastguide.models.value import ValueModel
from fastguide.scorer import State, follow


@pytest.fixture(scope="module")
def scorer(stories: str, full_guide: str) -> TreeScorer:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    return ValueGuide(full_guide).load(LoadContext(tokenizer, torch.device("cpu"), torch.float32))


@pytest.fixture(scope="module")
def model(full_guide: str) -> ValueModel:
    return ValueModel.from_pretrained(full_guide, dtype=torch.float32)


@torch.inference_mode()
def alone(model: ValueModel, row: list[int]) -> float:
    return float(model(torch.tensor([row]))[0, -1])


def rows(*lengths: int) -> list[list[int]]:
    return [[(17 * i * i + 3 * i + n) % 2048 for i in range(n)] for n in lengths]


def test_ragged_requests_and_branches_of_several_tokens(
    scorer: TreeScorer, model: ValueModel
) -> None:
    prompts = rows(30, 4, 11)
    states = [scorer.open(prompt) for prompt in prompts]
    candidates = [[5, 6, 7], [(8, 9, 10), 11], [(12,), (13, 14), 15, 15]]
    found = scorer.score(states, candidates)
    assert [len(f) for f in found] == [3, 2, 4]
    for prompt, own, scores in zip(prompts, candidates, found, strict=True):
        for candidate, score in zip(own, scores.tolist(), strict=True):
            branch = [candidate] if isinstance(candidate, int) else list(candidate)
            assert score == pytest.approx(alone(model, prompt + branch), abs=1e-5)
    states[1].append(8, 9, 10)  # a whole branch is kept: nothing of it is computed again
    assert states[1].pending == []
    states[0].append(2000)  # was not scored: goes into the next pass
    assert states[0].pending == [2000]
    found = scorer.score(states, [[1], [2], [3]])
    assert found[1].item() == pytest.approx(alone(model, [*prompts[1], 8, 9, 10, 2]), abs=1e-5)
    for state in states:
        state.close()
    assert scorer.decoder.pool.slots.in_use == 0


def test_scratch_is_k_slots_however_many_steps(scorer: TreeScorer) -> None:
    (prompt,) = rows(20)
    state = scorer.open(prompt)
    pool = scorer.decoder.pool
    for step in range(10):
        scorer.score([state], [list(range(50, 70))])
        assert pool.slots.in_use == 20 + step + 20  # the tokens so far, and k scratch slots
        state.append(57)
        assert pool.slots.in_use == 20 + step + 1
    state.close()


def test_candidates_of_numpy_and_torch(scorer: TreeScorer) -> None:
    state = scorer.open([5, 6, 7])
    ids = [3, 9, 27]
    (plain,) = scorer.score([state], [ids])
    for same in (np.array(ids), torch.tensor(ids)):
        assert torch.allclose(scorer.score([state], [same])[0], plain, atol=1e-6)  # type: ignore[list-item]
    branches = [[3, 4], [9, 4]]
    (plain,) = scorer.score([state], [branches])
    for same in ([np.array(b) for b in branches], [torch.tensor(b) for b in branches]):
        assert torch.allclose(scorer.score([state], [same])[0], plain, atol=1e-6)
    state.close()


def test_an_empty_prompt_and_the_first_token(scorer: TreeScorer, model: ValueModel) -> None:
    state = scorer.open([])
    (found,) = scorer.score([state], [[7, 9]])
    assert found[1].item() == pytest.approx(alone(model, [9]), abs=1e-5)
    state.close()


@pytest.mark.parametrize(
    ("count", "candidates", "message"),
    [
        (1, [[]], "empty candidate"),
        (1, [[()]], "empty candidate"),
        (1, [[1], [2]], "candidates for 2 of 1 requests"),
        (1, [[2048]], "received token id 2048; allowed are 0 to 2047"),
        (1023, [[(1, 2)]], "a continuation has 1025 tokens; the scorer's context is 1024"),
    ],
)
def test_wrong_calls(scorer: TreeScorer, count: int, candidates: list, message: str) -> None:
    state = scorer.open([1] * count)
    with pytest.raises(ValueError, match=message):
        scorer.score([state], candidates)
    state.close()
    assert scorer.score([], []) == []


def test_follow_continues_forks_and_opens(scorer: TreeScorer, model: ValueModel) -> None:
    """Token rows of a host: plain steps, a beam that moves, a row that starts anew."""
    first, second = rows(12, 9)
    states: list[State] = follow(scorer, [], [first, second])
    scorer.score(states, [[1, 2], [3, 4]])
    kept = states[0]
    states = follow(scorer, states, [[*first, 1], [*first, 2], [500, 501]])
    assert states[0] is kept
    assert states[0].pending == []  # type: ignore[attr-defined]
    assert [s.tokens for s in states] == [[*first, 1], [*first, 2], [500, 501]]
    found = scorer.score(states, [[7], [7], [7]])
    for state, score in zip(states, found, strict=True):
        assert score.item() == pytest.approx(alone(model, [*state.tokens, 7]), abs=1e-5)
    # Beam 1 takes beam 0's place and the other way round.
    states = follow(scorer, states, [[*first, 2, 7], [*first, 1, 9]])
    found = scorer.score(states, [[8], [8]])
    for state, score in zip(states, found, strict=True):
        assert score.item() == pytest.approx(alone(model, [*state.tokens, 8]), abs=1e-5)
    assert follow(scorer, states, []) == []
    assert scorer.decoder.pool.slots.in_use == 0
