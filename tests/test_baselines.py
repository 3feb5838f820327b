"""The baselines decode what fastguide decodes, and read the weights that it has."""

from __future__ import annotations

import json
from pathlib import Path

import bench_engine
import pytest
import torch
from baselines import CASES, Models, Plan, check, measure
from honest import Method
from published import write_models
from shapes import TINY, build, open_rows, prompt_tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastguide import Plain


@pytest.fixture(scope="module")
def models() -> Models:
    """The honest baseline's, in fp32."""
    return Models.load("cpu", torch.float32, TINY)


def test_honest_greedy_tokens_are_those_of_fastguide() -> None:
    agreed = check("cpu", shape=TINY, steps=12)
    runner = build("cpu", torch.float32, TINY)
    rows = open_rows(runner, Plain(), [prompt_tokens(0, 32, TINY)], 0.0)
    plain = [runner.step(rows)[0].tokens[0] for _ in range(12)]
    found = [plain, *(tokens[0] for tokens in agreed.values())]
    assert len({tuple(tokens) for tokens in found}) == 3  # the methods matter


@pytest.mark.parametrize("method", [Method("vas", 5, 1.0, 1.0), Method("args", 5, 1.0, 1.0)])
@torch.inference_mode()
def test_honest_caches_hold_the_tokens_that_were_drawn(models: Models, method: Method) -> None:
    """Those drawn outside the candidates too."""
    prompts = [prompt_tokens(row, 9, TINY) for row in range(3)]
    decoding = models.decoding(prompts, method)
    drawn = torch.tensor([decoding.step() for _ in range(6)]).T
    assert (decoding.outside > 0) == (method.name == "vas")
    texts = torch.cat([torch.tensor(prompts), drawn], dim=1)
    whole = models.policy(texts).logits[:, -1]
    cached = models.policy(decoding.pending, past_key_values=decoding.policy_cache).logits[:, -1]
    torch.testing.assert_close(cached, whole)
    candidates = whole.topk(method.k).indices
    expected = [
        models.head(models.guide(torch.cat([texts, ids[:, None]], 1)).last_hidden_state[:, -1])
        for ids in candidates.T
    ]
    torch.testing.assert_close(decoding._score(candidates), torch.cat(expected, 1))


def test_honest_vas_draws_from_equation_4(models: Models) -> None:
    torch.manual_seed(0)
    decoding = models.decoding([[1, 2, 3]], Method("vas", 4, 2.0, 0.5))
    logits, scores = torch.randn(1, 9), torch.randn(1, 4)
    ids = logits.topk(4).indices
    values = torch.full_like(logits, float(scores.mean())).scatter(1, ids, scores)
    expected = ((logits / 0.5).softmax(-1) * (2.0 * values).exp())[0]
    given: list[torch.Tensor] = []
    decoding._pick = lambda z: given.append(z) or torch.zeros(1, 1, dtype=torch.long)  # type: ignore
    decoding._vas(logits, ids, scores)
    torch.testing.assert_close(given[0][0].softmax(-1), expected / expected.sum())


def test_greedy_choice_may_be_no_candidate(models: Models) -> None:
    decoding = models.decoding([[1, 2, 3]], Method("vas", 2, 10.0))
    logits, scores = torch.tensor([[3.0, 2.9, 2.8]]), torch.zeros(1, 2)
    for ids, expected in (([0, 1], (0, 0)), ([1, 2], (-1, 0))):
        chosen, tokens = decoding._vas(logits, torch.tensor([ids]), scores)
        assert (chosen.item(), tokens.item()) == expected


def test_every_row_is_measured_or_has_a_reason() -> None:
    runner = build("cpu", torch.bfloat16, TINY)
    found = measure(Plan("cpu", prompt=16, steps=3, rounds=2, shape=TINY), runner)
    cases = ["unguided", *CASES]
    ours = {f"fastguide {case}" for case in cases} | {f"honest {case}" for case in CASES}
    assert ours | {"transformers unguided"} <= found["rows"].keys()
    assert all(row["steps"] == 6 and row["ms"] > 0 for row in found["rows"].values())
    missing = found["missing"]
    assert missing["gpt-fast unguided"] == "gpt-fast: no --gpt-fast-repo"
    assert "vLLM unguided" in missing.keys() | found["rows"].keys()
    assert json.loads(json.dumps(found)) == found


@torch.inference_mode()
def test_written_models_are_those_of_the_benchmark(tmp_path: Path, models: Models) -> None:
    write_models(tmp_path, torch.float32, TINY)
    text = torch.tensor([prompt_tokens(0, 12, TINY)])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(policy(text).logits, models.policy(text).logits)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "guide", num_labels=1)
    hidden = models.guide(text).last_hidden_state[:, -1]
    torch.testing.assert_close(reward(text).logits, hidden @ models.head.weight.T)


@pytest.mark.parametrize("option", ["--args-repo", "--published-python"])
def test_published_code_needs_its_environment_and_its_clone(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_engine.py", option, "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        bench_engine.read_arguments()
    assert "--published-python needs --args-repo or --vas-repo" in capsys.readouterr().err
