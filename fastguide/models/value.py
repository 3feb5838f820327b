"""A value model: a causal backbone with a scalar head, and its folder format.

A guide folder holds ``guide_config.json`` (see `GuideConfig`), ``value_head.safetensors`` and
either a peft LoRA adapter (``adapter_config.json``, ``adapter_model.safetensors``) on the base
model that the config names, or the whole backbone (``config.json``, ``model.safetensors``), or
neither: then the backbone is that base model, as it is.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers import AutoModel, PreTrainedModel

from fastguide.assets import names, resolve
from fastguide.models.guide_config import CONFIG_FILE, GuideConfig, RewardScale
from fastguide.models.heads import MLPHead, ScalarHead, make_head
from fastguide.models.loading import load_config, load_weights, one_line
from fastguide.models.locate import locate

__all__ = ["GuideConfig", "RewardScale", "ValueModel"]

HEAD_FILE = "value_head.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
BACKBONE_FILES = ("config.json", "generation_config.json", "model*.safetensors*")
GUIDE_FILES = (CONFIG_FILE, HEAD_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE, *BACKBONE_FILES)
"""What a guide folder may hold, as patterns."""


class ValueModel(nn.Module):
    """Causal backbone plus scalar head: the V of eq. 3 of the VAS paper.

    Attributes: ``backbone`` (a transformers model without LM head, or a peft model around one),
    ``head`` (`ScalarHead` or `MLPHead`, fp32) and ``config`` (`GuideConfig`).
    """

    def __init__(
        self, backbone: nn.Module, head: ScalarHead | MLPHead, config: GuideConfig
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.config = config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Values of all prefixes.

        State convention (the only place where it is defined): the value at position t is the
        value of the prefix that **ends with token t**, that is V(s) of the state reached by
        appending token t. So Q(s, x) = V(s + x) (eq. 3) is read at the position of x, the value
        of a prompt at its last token, and the value of a finished response at its last token,
        eos included if there is one. Values are in units of `RewardScale`. If the reward is paid
        per token (``RewardScale.per_token``), the value is what is still to come, the reward of
        token t included, up to a constant. What was paid before is the same for all candidates
        of a step, so eq. 4 does not change.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]``, 1 for tokens and 0 for padding; values at padding are
                meaningless.

        Returns:
            ``[B, T]`` fp32.
        """
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self.head(output.last_hidden_state).squeeze(-1)

    @classmethod
    def create(
        cls,
        base: str | Path,
        *,
        lora_rank: int | None = 16,
        lora_alpha: int | None = None,
        target_modules: str | list[str] = "all-linear",
        freeze: bool = False,
        head: str = "linear",
        quantization: Any = None,
        config: GuideConfig | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> ValueModel:
        """A fresh value model on ``base`` (path, hub id or packaged name), its head at zero.

        With ``freeze`` the head trains alone; with ``lora_rank=None`` every weight of the backbone
        does, too; else a LoRA of that rank (``lora_alpha`` defaults to the rank) on
        ``target_modules`` and the head do. ``head`` is one of ``HEADS``. ``quantization`` is a
        quantization config of transformers, for a backbone whose own weights do not train.

        Raises:
            ValueError: an unknown head, a rank below 1, or a quantized backbone that would train.
        """
        if quantization is not None and lora_rank is None and not freeze:
            raise ValueError("a quantized backbone cannot train: give it a LoRA, or freeze it")
        more = {} if quantization is None else {"quantization_config": quantization}
        where = resolve(base)
        backbone: nn.Module = load_weights(
            AutoModel,
            base,
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            **more,
        )
        hidden_size = _hidden_size(backbone)
        if freeze:
            backbone.requires_grad_(False)
        elif lora_rank is not None:
            from peft import LoraConfig

            if lora_rank < 1:
                raise ValueError(f"lora_rank must be at least 1 or None, got {lora_rank}")
            lora = LoraConfig(
                r=lora_rank,
                lora_alpha=lora_rank if lora_alpha is None else lora_alpha,
                target_modules=target_modules,
                bias="none",
            )
            backbone = _with_lora(backbone, lora)
        config = dataclasses.replace(
            config or GuideConfig(base_model=where), head=head, frozen=freeze
        )
        model = cls(backbone, make_head(head, hidden_size), config)
        return model.to(device) if device is not None else model

    def base_path(self, folder: str | Path) -> str:
        """Where the guide in ``folder`` says that its base model is: a path or a hub id."""
        return _base_path(self.config.base_model, Path(folder))

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, base_model: str | None = None
    ) -> None:
        """Write the guide folder; weights are cast to ``dtype`` (default: as they are).

        ``base_model`` replaces the config's entry, e.g. by a path relative to ``folder``.
        """
        from peft import PeftModel, get_peft_model_state_dict

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.clear(target)
        config = dataclasses.replace(self.config, base_model=base_model or self.config.base_model)

        def stored(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()

        if isinstance(self.backbone, PeftModel):
            lora: Any = dataclasses.replace(self.backbone.peft_config["default"])
            lora.base_model_name_or_path = config.base_model
            lora.inference_mode = True
            if isinstance(lora.target_modules, set):  # written in an order that does not change
                lora.target_modules = sorted(lora.target_modules)
            lora.save_pretrained(str(target))
            state = get_peft_model_state_dict(self.backbone)
            adapter = {name: stored(t) for name, t in state.items()}
            (target / ADAPTER_FILE).write_bytes(save(adapter))
        elif self.config.frozen:
            pass  # it is the base model
        elif isinstance(self.backbone, PreTrainedModel):
            state = {name: stored(t) for name, t in self.backbone.state_dict().items()}
            self.backbone.save_pretrained(target, state_dict=state)
        else:
            raise ValueError(f"cannot save a backbone of type {type(self.backbone).__name__}")
        head = {name: stored(tensor) for name, tensor in self.head.state_dict().items()}
        (target / HEAD_FILE).write_bytes(save(head))
        config.save(target)

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove the guide that a folder holds, if any: what is left of one would change the next.

        Other files stay, checkpoints among them.
        """
        if (folder / CONFIG_FILE).is_file():
            for pattern in GUIDE_FILES:
                for file in folder.glob(pattern):
                    file.unlink()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        base: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        merge: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> ValueModel:
        """Load a guide folder (local path, packaged name or hub id).

        ``base`` overrides the config's ``base_model``. ``merge`` folds a LoRA into the backbone
        in fp32 and casts the result to ``dtype`` (default: the base's own), so that ``backbone``
        is a plain transformers model. Pickled weights load only with ``allow_pickle``.

        Raises:
            ValueError: one sentence naming the file that is missing, corrupt or of wrong shape.
        """
        folder = local_folder(path)
        config = GuideConfig.load(folder)
        is_lora = (folder / ADAPTER_CONFIG_FILE).is_file()
        merge = merge and is_lora
        source: str | Path = folder
        if is_lora or config.frozen:
            what = "LoRA" if is_lora else "head"
            source = base or find_base(path, what, config.base_model, folder)
        final = dtype or _stored_dtype(source, trust_remote_code) if merge else None
        backbone: nn.Module = load_weights(
            AutoModel,
            source,
            dtype=torch.float32 if merge else dtype or "auto",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        if is_lora:
            backbone = _add_adapter(backbone, folder)
        if merge:
            backbone = backbone.merge_and_unload().to(final)  # type: ignore[operator]
        head = make_head(config.head, _hidden_size(backbone))
        load_state(head, folder / HEAD_FILE)
        model = cls(backbone, head, config).eval()
        return model.to(device) if device is not None else model

    def load_folder(self, folder: str | Path) -> None:
        """Take over the weights of a folder that this very model wrote, in place.

        Raises:
            ValueError: a file is missing, corrupt or of another model.
        """
        from peft import PeftModel

        source = Path(folder)
        if isinstance(self.backbone, PeftModel):
            load_state(self.backbone, source / ADAPTER_FILE)
        elif not self.config.frozen:
            whole = type(self.backbone).from_pretrained(source)  # type: ignore[attr-defined]
            self.backbone.load_state_dict(whole.state_dict())
        load_state(self.head, source / HEAD_FILE)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        dtype: torch.dtype | None = None,
        base_model: str | None = None,
    ) -> str:
        """Upload the guide folder to the Hugging Face Hub.

        Args:
            repo_id: ``user/name``; made if needed.
            private: whether a repository that is made is; None is the account's default.
            token: of the hub; None is the one of ``hf auth login``.
            dtype: as in ``save_pretrained``.
            base_model: where others find the base model: a hub id or packaged name; None is the
                config's.

        Returns:
            Its address.

        Raises:
            ValueError: the guide needs its base model, which is named by a path of this machine.
        """
        from huggingface_hub import HfApi

        named = base_model or self.config.base_model
        here = Path(named).is_absolute() or named.startswith(".") or Path(named).is_dir()
        if here and named not in names():
            if self._needs_base():
                raise ValueError(
                    f"the guide needs its base model, which is {named!r} on this machine alone; "
                    "allowed with base_model=, a hub id that others load it from"
                )
            named = Path(named).name  # says what it was made from, not how this machine is ordered
        hub = HfApi(token=token)
        repo = hub.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype=dtype, base_model=named)
            hub.upload_folder(repo_id=repo.repo_id, folder_path=folder)
        return str(repo)

    def _needs_base(self) -> bool:
        from peft import PeftModel

        return self.config.frozen or isinstance(self.backbone, PeftModel)


def local_folder(path: str | Path) -> Path:
    where = locate(path, CONFIG_FILE, "guide")
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, ignore_patterns=["*.md"]))
    except OSError as error:
        raise ValueError(f"cannot fetch the guide {where!r}: {one_line(error)}") from error


def find_base(path: str | Path, what: str, base_model: str, folder: Path) -> str:
    """The base model that a guide without weights of its own names."""
    try:
        return locate(_base_path(base_model, folder))
    except ValueError as error:
        raise ValueError(
            f"the guide {str(path)!r} is a {what} on {base_model!r}, but there is {error}; "
            "name its base model with ValueGuide(path, base=...), or with --guide-base"
        ) from error


def _base_path(base_model: str, folder: Path) -> str:
    """The folder that a relative ``base_model`` means, else the name as it is (a hub id)."""
    beside = folder / base_model
    return str(beside.resolve()) if beside.is_dir() else resolve(base_model)


def _stored_dtype(source: str | Path, trust_remote_code: bool) -> torch.dtype:
    config = load_config(source, trust_remote_code=trust_remote_code)
    return getattr(config, "dtype", None) or torch.float32


def _hidden_size(backbone: Any) -> int:
    config = backbone.config.get_text_config()
    # OPT projects its last hidden state to the width of its embeddings.
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def _with_lora(backbone: nn.Module, lora: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft asks transformers for a property under its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(backbone, lora)


def _add_adapter(backbone: nn.Module, folder: Path) -> nn.Module:
    """Put the folder's LoRA on ``backbone``; every tensor must be there and fit."""
    from peft import LoraConfig

    try:
        lora = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG_FILE}: {one_line(error)}") from error
    lora.base_model_name_or_path = None  # the base is given, wherever it lies
    model = _with_lora(backbone, lora)
    load_state(model, folder / ADAPTER_FILE)
    return model


def load_state(module: nn.Module, file: Path) -> None:
    """Copy a safetensors file into a head or a peft model; ValueError names what is wrong."""
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    if not file.is_file():
        raise ValueError(f"the guide's file {file} is missing")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is corrupt: {one_line(error)}") from error
    is_lora = isinstance(module, PeftModel)
    wanted = get_peft_model_state_dict(module) if is_lora else module.state_dict()
    if odd := sorted(set(wanted) ^ set(state)):
        raise ValueError(f"{file} does not fit the model: {odd[0]} is in only one of the two")
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{file} does not fit the model: {name} has shape {list(state[name].shape)}, "
                f"the model needs {list(tensor.shape)}"
            )
    if is_lora:
        set_peft_model_state_dict(module, state)
    else:
        module.load_state_dict(state)
