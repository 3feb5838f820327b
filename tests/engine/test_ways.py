"""All ways to run a guide give the same tokens and scores: one pass, two phases, trunk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastguide import (
    ARGS,
    VAS,
    Completion,
    Engine,
    FunctionGuide,
    Plain,
    SamplingParams,
    ValueGuide,
)
from fastguide.engine.ways import PassCost
from fastguide.models.decoder import Decoder
from fastguide.models.value import ValueModel

PROMPTS = [
    "Once upon a time, there was a little dog named Max. Max loved to",
    "One day",
    "The sun was hot. Lily and her mom went to the beach to play in the sand. Then a big wave",
]
RULES = [
    VAS(8.0, 12),
    VAS(8.0, 12, candidate_mass=0.7),
    VAS(-4.0, 5, "drop"),
    ARGS(4.0, 6),
]


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.9, "max_tokens": 20, "seed": 11} | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(stories: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Value models on the story model: two LoRAs, of other ranks and modules, and a frozen one."""
    made = {}
    for seed, (name, options) in enumerate(
        {
            "a": {"lora_rank": 4},
            "b": {"lora_rank": 6, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
            "t": {"freeze": True, "head": "mlp"},
        }.items()
    ):
        torch.manual_seed(seed)
        model = ValueModel.create(stories, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.05)
            for weight in model.head.parameters():
                weight.normal_(std=0.3)
        made[name] = str(tmp_path_factory.mktemp(name) / "guide")
        model.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def engine_of(stories: str, folders: dict[str, str]) -> Callable[..., Engine]:
    def make(way: str = "auto", guides: str = "abt", **options: object) -> Engine:
        chosen = {name: ValueGuide(folders[name]) for name in guides}
        return Engine(stories, chosen, dtype="float32", way=way, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def apart(
    stories: str, folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    """An engine whose guides have weights of their own: LoRAs merged, nothing shared."""
    copies = {}
    for name, folder in folders.items():
        model = ValueModel.from_pretrained(folder, dtype=torch.float32, merge=True)
        model.config = type(model.config)(**{**vars(model.config), "frozen": False})
        copies[name] = ValueGuide(_saved(model, tmp_path_factory.mktemp(f"apart-{name}")))
    engine = Engine(stories, copies, dtype="float32")
    assert not engine.runner.ways.inside
    return engine


def _saved(model: ValueModel, folder: Path) -> str:
    model.save_pretrained(folder / "guide")
    return str(folder / "guide")


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert [s is None for s in mine.scores] == [s is None for s in theirs.scores]
        assert mine.scored == theirs.scored
        for name in ("scores", "logprobs", "base_logprobs", "kl"):
            numbers = [[x for x in getattr(c, name) if x is not None] for c in (mine, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], abs=2e-4)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    "weights", [{"a": 1.0}, {"t": 1.0}, {"a": 1.0, "b": -0.7, "t": 0.5}], ids=str
)
def test_ways_agree(
    engine_of: Callable[..., Engine],
    apart: Engine,
    rule: VAS | ARGS,
    temperature: float,
    weights: dict[str, float],
) -> None:
    sampling = params(temperature=temperature, n=1 if temperature == 0 else 2)
    expected = apart.generate(PROMPTS, rule, weights, sampling)
    plain = apart.generate(PROMPTS, sampling=sampling)
    assert [c.token_ids for c in expected] != [c.token_ids for c in plain]
    for way in ("one-pass", "two-phase"):
        engine = _engine(engine_of, way)
        before = engine.stats.ways.get(way, 0) + engine.stats.ways.get("trunk", 0)
        assert_same(engine.generate(PROMPTS, rule, weights, sampling), expected)
        assert engine.stats.ways.get(way, 0) + engine.stats.ways.get("trunk", 0) > before
        assert all(cache.in_use == 0 for cache in engine.stats.caches.values())


_engines: dict[str, Engine] = {}


def _engine(engine_of: Callable[..., Engine], way: str) -> Engine:
    if way not in _engines:
        _engines[way] = engine_of(way)
    return _engines[way]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_policy_reads_while_other_guides_do(
    stories: str, folders: dict[str, str], apart: Engine, rule: VAS | ARGS
) -> None:
    """As where guides are on other devices; here both are on one."""
    guides = {name: ValueGuide(folder) for name, folder in folders.items()}
    guides["a"] = ValueGuide(folders["a"], device="cpu")
    engine = _overlapping(stories, tuple(guides.items()))
    assert set(engine.runner.ways.beside) == {"a"}
    weights = [{"a": 1.0}, {"a": 1.0, "b": -0.7, "t": 0.5}, {"a": -1.0, "t": 1.0}]
    before = engine.stats.ways.get("overlap", 0)
    found = engine.generate(PROMPTS, rule, weights, params(n=2))
    assert_same(found, apart.generate(PROMPTS, rule, weights, params(n=2)))
    alone = engine.generate(PROMPTS, rule, weights[0], params())
    assert engine.stats.ways["overlap"] > before
    assert_same(alone, apart.generate(PROMPTS, rule, weights[0], params()))
    assert all(cache.in_use == 0 for cache in engine.stats.caches.values())


@functools.lru_cache
def _overlapping(stories: str, guides: tuple[tuple[str, ValueGuide], ...]) -> Engine:
    return Engine(stories, dict(guides), dtype="float32", device="cpu", way="overlap")


@pytest.mark.parametrize(
    ("policy", "guide", "pays"),
    [
        (lambda rows: 1.0, lambda rows: 1.0, True),  # a step takes 1 instead of 2
        (lambda rows: 1.0, lambda rows: 0.1, True),
        (lambda rows: rows / 8, lambda rows: 0.1, False),  # the policy is slow with many rows
        (lambda rows: rows / 8, lambda rows: rows, True),  # but the guide is slower still
    ],
)
def test_guides_elsewhere_overlap_where_that_pays(
    stories: str,
    full_guide: str,
    policy: Callable[[int], float],
    guide: Callable[[int], float],
    pays: bool,
) -> None:
    engine = Engine(stories, {"g": ValueGuide(full_guide)}, dtype="float32", device="cpu")
    ways, other = engine.runner.ways, engine.runner.scorers["g"].decoder  # type: ignore[attr-defined]
    ways.beside["g"] = other  # as if it were on another device
    ways.leapers = frozenset("g")
    ways._costs = {id(engine.runner.policy): policy, id(other): guide}  # type: ignore[dict-item]
    engine.generate(PROMPTS[0], VAS(2.0, 20), sampling=params())
    assert ("overlap" in engine.stats.ways) == pays


def test_rows_of_all_kinds_in_one_batch(engine_of: Callable[..., Engine], apart: Engine) -> None:
    """Plain rows, trunk heads, LoRAs, several at once: each as it is alone."""
    prompts = [PROMPTS[i % 3] for i in range(6)]
    rules = [None, VAS(8.0, 12), VAS(5.0, 7, candidate_mass=0.6), ARGS(4.0, 6), Plain(), VAS(9.0)]
    weights = [None, {"a": 1.0}, {"t": 1.0}, {"a": 1.0, "t": -1.0}, None, {"b": 2.0}]
    samplings = [params(max_tokens=5 + 4 * i, seed=i, n=1 + i % 2) for i in range(6)]
    expected = apart.generate(prompts, rules, weights, samplings)
    for way in ("one-pass", "two-phase", "auto"):
        assert_same(_engine(engine_of, way).generate(prompts, rules, weights, samplings), expected)


def test_draws_from_the_tail_and_waiting_samples(
    engine_of: Callable[..., Engine], apart: Engine
) -> None:
    """A hot temperature draws outside of few candidates: the policy reads such a token next."""
    sampling = params(temperature=1.6, max_tokens=30, n=3)
    rule, weights = VAS(3.0, 2), {"a": 1.0, "t": 1.0}
    expected = apart.generate(PROMPTS, rule, weights, sampling)
    assert any(score is None for c in expected for score in c.scores)
    engine = engine_of("one-pass", max_rows=4)
    assert_same(engine.generate(PROMPTS, rule, weights, sampling), expected)


def test_a_short_pool_preempts_one_pass_rows(
    engine_of: Callable[..., Engine], apart: Engine
) -> None:
    sampling, weights = params(max_tokens=40, n=3, ignore_eos=True), {"a": 1.0}
    expected = apart.generate(PROMPTS, VAS(8.0, 12), weights, sampling)
    whole = engine_of("one-pass", "a")
    each = sum(whole.loop.caches.slot_bytes().values())
    engine = engine_of("one-pass", "a", kv_memory=330 * each)
    assert_same(engine.generate(PROMPTS, VAS(8.0, 12), weights, sampling), expected)
    assert engine.stats.preemptions > 0
    assert all(cache.in_use == 0 for cache in engine.stats.caches.values())


def test_a_way_changes_between_steps(engine_of: Callable[..., Engine], apart: Engine) -> None:
    """What one step left, the other way takes up."""
    engine = engine_of("auto", "ab")
    ways, turns = engine.runner.ways, iter([True, False, False, True] * 100)
    ways._pays = lambda *_: next(turns)  # type: ignore[method-assign]
    weights = {"a": 1.0, "b": 1.0}
    found = engine.generate(PROMPTS, VAS(8.0, 12), weights, params(n=2))
    assert_same(found, apart.generate(PROMPTS, VAS(8.0, 12), weights, params(n=2)))
    assert min(engine.stats.ways["one-pass"], engine.stats.ways["two-phase"]) > 5


def test_models_without_a_native_stack(
    engine_of: Callable[..., Engine], apart: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters wrap the layers of transformers, where those compute."""
    monkeypatch.setattr("fastguide.models.packing.available", lambda *_: False)
    engine = engine_of("one-pass")
    assert not engine.runner.policy.stacked
    weights = {"a": 1.0, "b": -0.7, "t": 0.5}
    found = engine.generate(PROMPTS, VAS(8.0, 12), weights, params())
    assert_same(found, apart.generate(PROMPTS, VAS(8.0, 12), weights, params()))


def test_guides_beside_the_policy_are_asked_too(
    stories: str, folders: dict[str, str], full_guide: str
) -> None:
    """A row in one pass may have guides with weights of their own, and functions."""
    guides = {
        "a": ValueGuide(folders["a"]),
        "full": ValueGuide(full_guide),
        "f": FunctionGuide(lambda text: text.count("a") / 5),
    }
    found = [
        Engine(stories, guides, dtype="float32", way=way).generate(
            PROMPTS, VAS(6.0, 8), sampling=params()
        )
        for way in ("one-pass", "two-phase")
    ]
    assert_same(*found)


def test_prefixes_of_adapters_are_not_each_others(engine_of: Callable[..., Engine]) -> None:
    """The same prompt through other adapters has other keys and values."""
    engine = engine_of("two-phase", "ab")
    fresh = [
        engine_of("two-phase", "ab").generate(PROMPTS[0], VAS(8.0, 8), {n: 1.0}, params())
        for n in "ab"
    ]
    for _ in range(2):
        for name, expected in zip("ab", fresh, strict=True):
            assert_same(engine.generate(PROMPTS[0], VAS(8.0, 8), {name: 1.0}, params()), expected)
    assert engine.stats.prefix_hits > 0


def test_guides_on_the_policy_take_no_weights_of_their_own(
    engine_of: Callable[..., Engine],
) -> None:
    engine = engine_of("auto")
    policy = engine.runner.policy
    assert all(scorer.decoder is policy for scorer in engine.runner.scorers.values())  # type: ignore[attr-defined]
    assert list(engine.stats.caches) == ["model"]


def test_a_lora_on_another_base_is_merged(
    stories: str, folders: dict[str, str], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(stories, tmp_path / "copy")
    engine = Engine(stories, {"a": ValueGuide(folders["a"], base=tmp_path / "copy")})
    assert not engine.runner.ways.inside


def test_an_unknown_way_is_refused(stories: str) -> None:
    with pytest.raises(
        ValueError, match=r"way is 'three'; allowed are auto, one-pass, overlap, two-phase"
    ):
        Engine(stories, way="three")


def test_costs_of_passes_rise_with_their_rows(stories: str) -> None:
    from fastguide.models.loading import load_policy

    cost = PassCost(load_policy(stories, dtype="float32"))
    seconds = [cost(rows) for rows in (0, 1, 3, 16, 100, 256, 1000)]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0.0


def test_policies_whose_logits_are_more_than_their_head(tmp_path: Path) -> None:
    from architectures import tiny_model

    for case, plain in (("llama", True), ("gemma2-softcap", False), ("cohere", False)):
        decoder = Decoder(tiny_model(case))  # type: ignore[arg-type]
        assert decoder.splits == plain
