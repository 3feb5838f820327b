"""Which models fastguide can run: checked by name where known, by a trial pass where not.

A variant that cannot be honoured is refused here, with its name, before it can give wrong
numbers. ``VERIFIED`` is the list that ``tests/models/test_architectures.py`` runs against a full
recompute; other decoders are admitted if a trial pass agrees with their own attention.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fastguide.models.attention import NAME
from fastguide.models.decoder import Decoder

VERIFIED = frozenset(
    "llama opt gpt_neox gpt2 qwen2 qwen3 mistral gemma gemma2 gemma3_text phi phi3 starcoder2 "
    "olmo2 granite smollm3 cohere".split()
)

_LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})
"""Rotary types whose angles depend on the longest sequence seen so far: a key that is in the cache
would have to turn when its sequence, or a neighbour's in the same pass, grows."""

_LAYERS = frozenset({"full_attention", "sliding_attention"})
_TRIAL_TOKENS = 12


def check_config(config: PreTrainedConfig) -> None:
    """Refuse configs whose attention fastguide cannot honour.

    Raises:
        ValueError: naming the model type, the variant found and what is allowed.
    """
    text = config.get_text_config()
    kind = config.model_type

    def refuse(found: str, allowed: str) -> None:
        raise ValueError(
            f"model type {kind!r} has {found}, which fastguide cannot honour; {allowed}"
        )

    if getattr(config, "is_encoder_decoder", False):
        refuse("an encoder and a decoder", "allowed are decoder-only models")
    layers = set(getattr(text, "layer_types", None) or ())
    if layers - _LAYERS:
        refuse(f"layers of type {sorted(layers - _LAYERS)}", f"allowed are {sorted(_LAYERS)}")
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi":
        refuse("ALiBi attention biases", "allowed are rotary and learned positions")
    if getattr(text, "use_bidirectional_attention", False):
        refuse("bidirectional attention", "allowed is causal attention")
    if getattr(text, "num_kv_shared_layers", 0):
        refuse("layers that share keys and values", "allowed is one cache per layer")
    rotary = _rope_types(getattr(text, "rope_parameters", None)) & _LENGTH_DEPENDENT
    if rotary:
        refuse(f"{min(rotary)} rotary positions", "allowed are types that do not depend on length")
    window = (
        getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    )
    if window and text.model_type not in VERIFIED:
        refuse(
            f"a sliding window of {window}",
            f"sliding windows are verified for {', '.join(sorted(VERIFIED))}",
        )


def _rope_types(parameters: object) -> set[str]:
    """All rotary types in a config's ``rope_parameters``, per layer type or for all layers."""
    if not isinstance(parameters, dict):
        return set()
    own = {str(parameters["rope_type"])} if parameters.get("rope_type") else set()
    return own.union(*map(_rope_types, parameters.values()))


def check_model(model: PreTrainedModel) -> None:
    """Refuse models that would bypass or contradict fastguide's attention.

    Raises:
        ValueError: naming the model class and the disagreement.
    """
    name = type(model).__name__
    if not getattr(type(model), "_supports_attention_backend", False):
        raise ValueError(
            f"{name} does not call transformers' attention interface, so fastguide cannot batch "
            "its candidates; allowed are models with `_supports_attention_backend = True`"
        )
    if model.config.get_text_config().model_type not in VERIFIED:
        _trial(model)


@torch.inference_mode()
def _trial(model: PreTrainedModel) -> None:
    """Compare a prefix and three branches with the model's own attention on the full texts."""
    vocab = model.config.get_text_config().vocab_size
    prefix = [(7 * i + 3) % vocab for i in range(_TRIAL_TOKENS)]
    branches = [(token % vocab,) for token in (1, 5, 11)]
    decoder = Decoder(model)
    try:
        found = decoder.run([decoder.open(prefix)], [branches]).float()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} failed a trial pass ({type(error).__name__}: {error}); "
            "fastguide supports decoder-only transformers models with standard attention"
        ) from error
    model.set_attn_implementation("eager")
    try:
        texts = torch.tensor([[*prefix, *b] for b in branches], device=model.device)
        out = model(input_ids=texts, use_cache=False)
        expected = (out.logits if hasattr(out, "logits") else out.last_hidden_state)[:, -1].float()
    finally:
        model.set_attn_implementation(NAME)
    distance = float((found - expected).norm() / expected.norm())
    allowed = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not distance <= allowed:
        raise ValueError(
            f"{type(model).__name__} disagrees with its own attention in a trial pass (relative "
            f"error {distance:.2g}, allowed {allowed:g}); it has a variant fastguide does not know"
        )
