"""Guide folders: round trip, merging, and one clear sentence for each thing that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaModel

from fastguide import assets
from fastguide.models.value import GuideConfig, RewardScale, ValueModel

IDS = torch.tensor([[0, 424, 439, 259], [0, 323, 447, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
CONFIG = GuideConfig(
    "stories", RewardScale("cheer", 0.25, 0.5, per_token=True), 1.0, 0.9, {"lr": 1e-3}
)


def scrambled(model: ValueModel) -> ValueModel:
    """Every trainable weight moved off its initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@pytest.fixture
def lora() -> ValueModel:
    return scrambled(ValueModel.create("stories", lora_rank=4, config=CONFIG))


@pytest.fixture
def folder(lora: ValueModel, tmp_path: Path) -> Path:
    lora.save_pretrained(tmp_path / "guide")
    return tmp_path / "guide"


def test_a_fresh_model_says_zero_and_trains_only_lora_and_head() -> None:
    model = ValueModel.create("stories", lora_rank=2)
    values = model(IDS, MASK)
    assert values.shape == (2, 4)
    assert values.dtype == torch.float32
    assert values.abs().max() == 0
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert all("lora_" in name or name.startswith("head.") for name in trainable)
    assert sum("lora_A" in name for name in trainable) == 6 * 7  # all linear layers


@torch.no_grad()
def test_round_trip(lora: ValueModel, folder: Path) -> None:
    loaded = ValueModel.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(loaded(IDS, MASK), lora(IDS, MASK), rtol=0, atol=0)
    assert loaded.config.reward == CONFIG.reward
    assert (loaded.config.lam, loaded.config.training) == (0.9, {"lr": 1e-3})
    assert lora(IDS, MASK).abs().min() > 0


@torch.no_grad()
def test_padding_does_not_move_values(lora: ValueModel) -> None:
    alone = lora(IDS[1:, :3], MASK[1:, :3])
    torch.testing.assert_close(lora(IDS, MASK)[1:, :3], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_merged_equals_unmerged(lora: ValueModel, folder: Path) -> None:
    merged = ValueModel.from_pretrained(folder, dtype=torch.float32, merge=True)
    assert type(merged.backbone) is LlamaModel
    torch.testing.assert_close(merged(IDS, MASK), lora(IDS, MASK), rtol=1e-4, atol=1e-4)
    half = ValueModel.from_pretrained(folder, merge=True)  # the base's own dtype
    assert half.backbone.dtype == torch.bfloat16
    assert half.head.weight.dtype == torch.float32
    # bf16 rounds the merged weights once; merging in bf16 would round adapter and sum as well.
    for name, weight in merged.backbone.state_dict().items():
        assert torch.equal(half.backbone.state_dict()[name], weight.bfloat16())


@torch.no_grad()
def test_full_weights(tmp_path: Path) -> None:
    model = scrambled(ValueModel.create("stories", lora_rank=None, config=CONFIG))
    model.save_pretrained(tmp_path / "full", dtype=torch.float32)
    loaded = ValueModel.from_pretrained(tmp_path / "full", dtype=torch.float32, merge=True)
    torch.testing.assert_close(loaded(IDS, MASK), model(IDS, MASK), rtol=0, atol=0)
    assert loaded.config.base_model == "stories"


@torch.no_grad()
def test_the_base_may_lie_beside_the_guide_or_be_given(lora: ValueModel, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(assets.packaged("stories"))
    lora.save_pretrained(tmp_path / "guide", base_model="../base")
    loaded = ValueModel.from_pretrained(tmp_path / "guide", dtype=torch.float32)
    torch.testing.assert_close(loaded(IDS, MASK), lora(IDS, MASK), rtol=0, atol=0)
    lora.save_pretrained(tmp_path / "guide", base_model="/nowhere/at-all")
    with pytest.raises(ValueError, match="/nowhere/at-all"):
        ValueModel.from_pretrained(tmp_path / "guide")
    ValueModel.from_pretrained(tmp_path / "guide", base="stories")


@pytest.mark.parametrize("name", ["value_head.safetensors", "adapter_model.safetensors"])
def test_missing_and_corrupt_weights_name_the_file(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=f"{name} is corrupt"):
        ValueModel.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        ValueModel.from_pretrained(folder)


def test_wrong_shapes_and_missing_tensors(folder: Path) -> None:
    head = load_file(folder / "value_head.safetensors")
    save_file({**head, "weight": torch.zeros(1, 7)}, folder / "value_head.safetensors")
    with pytest.raises(ValueError, match=r"weight has shape \[1, 7\], the model needs \[1, 256\]"):
        ValueModel.from_pretrained(folder)
    save_file(head, folder / "value_head.safetensors")
    adapter = load_file(folder / "adapter_model.safetensors")
    adapter.pop(sorted(adapter)[0])
    save_file(adapter, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is in only one of the two"):
        ValueModel.from_pretrained(folder)


def test_a_base_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    small = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaModel(small).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="does not fit the model"):
        ValueModel.from_pretrained(folder, base=tmp_path / "small")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, r"unknown keys \['colour'\]"),
        ({"format_version": 9}, "format_version 9"),
        ({"kind": "q"}, "kind 'q'"),
        ({"base_model": None}, "must name its base_model"),
        ({"reward": {"name": "r", "mean": 0, "std": 0}}, "std must be above 0"),
        ({"reward": {"typo": 1}}, "bad reward entry"),
    ],
)
def test_wrong_configs(folder: Path, change: dict[str, object], message: str) -> None:
    file = folder / "guide_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        ValueModel.from_pretrained(folder)


def test_no_guide_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"guide_config\.json is missing"):
        ValueModel.from_pretrained(tmp_path / "empty")
    (folder / "guide_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ValueModel.from_pretrained(folder)


def test_pickled_weights_need_leave(tmp_path: Path) -> None:
    model = ValueModel.create("stories", lora_rank=None, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert isinstance(model.backbone, nn.Module)
    torch.save(model.backbone.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        ValueModel.from_pretrained(tmp_path)
    ValueModel.from_pretrained(tmp_path, allow_pickle=True)


# --------------------------------------------------------------------------------------- hub


class Hub:
    """What was asked of the hub, and what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, object] = {}
        self.files: dict[str, bytes] = {}
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)

    @property
    def config(self) -> dict:
        return json.loads(self.files["guide_config.json"])

    def create_repo(self, repo_id: str, **options: object) -> RepoUrl:
        self.asked = {"repo_id": repo_id, **options}
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
        assert repo_id == self.asked["repo_id"]
        self.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


def test_a_guide_goes_to_the_hub(
    lora: ValueModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[str | None] = []
    init = HfApi.__init__
    monkeypatch.setattr(
        HfApi, "__init__", lambda api, token=None: (tokens.append(token), init(api, token=token))[1]
    )
    hub = Hub(monkeypatch)
    address = lora.push_to_hub("me/guide", private=True, token="hf_mine")
    assert address == "https://huggingface.co/me/guide"
    assert hub.asked == {"repo_id": "me/guide", "private": True, "exist_ok": True}
    assert tokens == ["hf_mine"]
    lora.save_pretrained(tmp_path)
    assert hub.files == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    lora.push_to_hub("me/guide", dtype=torch.float16, base_model="someone/base")
    assert hub.config["base_model"] == "someone/base"
    assert b"someone/base" in hub.files["adapter_config.json"]
    (tmp_path / "head").write_bytes(hub.files["value_head.safetensors"])
    assert load_file(tmp_path / "head")["weight"].dtype == torch.float16


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"freeze": True}, {"lora_rank": None}])
def test_paths_of_this_machine_do_not_go_to_the_hub(
    options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    shutil.copytree(assets.packaged("stories"), tmp_path / "base")
    model = ValueModel.create(tmp_path / "base", **options)
    whole = options.get("lora_rank", 2) is None
    for name in (None, "../base", str(tmp_path / "base")):
        if whole:
            model.push_to_hub("me/guide", base_model=name)
            assert hub.config["base_model"] == "base"
        else:
            with pytest.raises(
                ValueError, match=r"on this machine alone; allowed with base_model="
            ):
                model.push_to_hub("me/guide", base_model=name)
            assert hub.files == {}
    model.push_to_hub("me/guide", base_model="stories")
    assert hub.config["base_model"] == "stories"
    assert not [name for name, data in hub.files.items() if str(tmp_path).encode() in data]


def test_packaged_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(assets.names()) >= {"stories", "cheerful", "brief"}
    monkeypatch.chdir(tmp_path)
    assert assets.resolve("cheerful") == str(assets.packaged("cheerful"))
    (tmp_path / "cheerful").mkdir()
    assert assets.resolve("cheerful") == str(assets.packaged("cheerful"))  # a name, not a path
    assert assets.resolve("./cheerful") == "./cheerful"
    assert assets.resolve(Path("cheerful")) == "cheerful"
    assert assets.resolve("org/model") == "org/model"
    with pytest.raises(ValueError, match="no packaged model is called 'gloomy'"):
        assets.packaged("gloomy")
