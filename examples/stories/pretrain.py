"""A small Llama-type story model from nothing: tokenizer, training, best checkpoint kept."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastguide import Engine, SamplingParams

END = "<|endoftext|>"
LENGTH = 256
BATCH = 32
PEAK_LR = 2e-3
DROPOUT = 0.1


def sample_stories(model: Path, count: int, file: Path, *, seed: int = 0) -> list[str]:
    """Stories of a small model, at temperature 0.9, from nothing but its beginning of text."""
    if not file.is_file():
        engine = Engine(model, guides={}, max_rows=128)
        start = [int(engine.tokenizer.bos_token_id)]
        sampling = SamplingParams(temperature=0.9, max_tokens=400, n=count, seed=seed)
        found = [output.text.strip() for output in engine.generate([start], sampling=sampling)]
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(file)
    stories: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return stories


def train_tokenizer(stories: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts ``<|endoftext|>`` (bos, eos and pad at once) before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
    )


def pretrain(
    train: list[str],
    valid: list[str],
    folder: Path,
    *,
    epochs: int,
    sampled: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Train on whole stories packed into rows of 256 tokens; AdamW, warm-up, cosine decay.

    ``sampled`` are stories of another model: an epoch has a third of them, in turn, beside all of
    ``train``. A few passes over a million tokens overfit; these tell more of the same.

    Writes model (bf16) and tokenizer into ``folder``; beside it a log and the state after every
    epoch, from which a killed run continues to the same weights.
    """
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(train)
    rows, held_out = _pack(tokenizer, train), _pack(tokenizer, valid)
    thirds = _pack(tokenizer, sampled).tensor_split(3)
    model = _fresh_model(len(tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1
    )
    lengths = [(len(rows) + len(thirds[e % 3])) // BATCH for e in range(epochs)]
    total = sum(lengths)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder.parent / "pretrain.pt"
    begin, best, seconds = 0, math.inf, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin, best, seconds = state["epoch"], state["best"], state["seconds"]
    step, started = sum(lengths[:begin]), time.perf_counter() - seconds
    for epoch in range(begin, epochs):
        torch.manual_seed(seed + epoch)  # of the order and the dropout, wherever the run began
        model.train()
        whole = torch.cat([rows, thirds[epoch % 3]])
        for picks in torch.randperm(len(whole))[: lengths[epoch] * BATCH].view(-1, BATCH):
            warm, done = min(1.0, (step + 1) / 100), step / total
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
            loss = _loss(model, whole[picks])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        error = _evaluate(model, held_out)
        entry = {"epoch": epoch + 1, "train": loss.item(), "valid": error}
        entry["seconds"] = time.perf_counter() - started
        with (folder.parent / "pretrain.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        print(f"epoch {epoch + 1} of {epochs}: {error:.4f} nats per held-out token", flush=True)
        if error < best:
            best = error
            weights = {name: t.detach().bfloat16() for name, t in model.state_dict().items()}
            del weights["lm_head.weight"]  # it is the embedding
            model.config.dtype = torch.bfloat16
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"epoch": epoch + 1, "best": best, "seconds": entry["seconds"]}
        part = checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(checkpoint)


def _fresh_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"  # faster than SDPA for training on CPU in bf16
    model = LlamaForCausalLM(config)

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, DROPOUT, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def _pack(tokenizer: PreTrainedTokenizerFast, stories: Sequence[str]) -> torch.Tensor:
    """``[rows, 257]``: stories one after the other, each begun by its bos, cut into rows."""
    stream = [token for story in stories for token in tokenizer(story).input_ids]
    rows = max(0, (len(stream) - 1) // LENGTH)
    starts = range(0, rows * LENGTH, LENGTH)
    whole = [stream[start : start + LENGTH + 1] for start in starts]
    return torch.tensor(whole, dtype=torch.int64).view(-1, LENGTH + 1)


def _loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def _evaluate(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    model.eval()
    losses = [_loss(model, chunk).item() * len(chunk) for chunk in rows.split(BATCH)]
    return sum(losses) / len(rows)
