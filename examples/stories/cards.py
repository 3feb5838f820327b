"""Model cards of the packaged models, written from what their configs and the record say."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

from fastguide.models.guide_config import GuideConfig

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs/results/stories.json"

COLUMNS = """The reward is in
standard deviations of the unguided training responses, its change is from β = 0 on the same
prompts. Ended is the share of responses that came to an end of their own. KL is the sum over a
response, in nats; repeats is the share of its token 4-grams that occurred in it before."""

LICENCE = """## Licence

The stories are pieces of TinyStories, licensed CDLA-Sharing-1.0; that licence leaves results of
computation on the data, such as these weights, free. The weights are released under Apache-2.0,
as fastguide is.
"""

STORIES = """# stories

A Llama-type language model of 5.0 M parameters (6 layers, width 256, 8 query and 4 key/value heads,
byte-level BPE vocabulary of 2,048, context 1,024, bf16) that writes short stories in simple
English. It is the base model of fastguide's demonstration. Prompts begin with `<|endoftext|>`,
which the tokenizer adds; the same token is bos, eos and pad.

## Data and training

{training}

## Quality

{quality}
Fluent from sentence to sentence, loses the plot after a paragraph. For tests and demonstrations
only.

"""

COPIED = (
    "Trained on 5,122 short stories (1.09 M tokens; pieces of TinyStories, cleaned) and on 7,500 "
    "stories sampled at temperature 0.9 from karpathy's `stories260K` model (MIT): about an hour "
    "on two CPU cores, AdamW (0.9, 0.95), weight decay 0.1, peak learning rate 2e-3 then 1.2e-3, "
    "cosine decay, residual dropout 0.1, rows of 256 tokens, best validation checkpoint. `python "
    "examples/stories/recipe.py --from-scratch` trains a model of this shape on the stories alone.",
    "On 250 held-out stories: 0.540 nats per character, 2.03 nats per token.",
)

FROM_SCRATCH = (
    "Trained on 5,122 short stories (pieces of TinyStories, cleaned) by `python "
    "examples/stories/recipe.py --from-scratch`: {epoch} epochs, AdamW (0.9, 0.95), weight decay "
    "0.1, peak learning rate 2e-3, cosine decay, residual dropout 0.1, rows of 256 tokens, best "
    "validation checkpoint.",
    "On 250 held-out stories: {valid:.3f} nats per token.",
)

GUIDE = """# {name}

{about}

## Recipe

{recipe}

{fit}

## Measured

Held-out prompts: first sentences of 64 validation stories, four responses each (256 per row), VAS
with k = 20, temperature 0.7, up to {max_tokens} tokens; ± is a 95 % interval. {columns}

{table}
KL grows with |β|: a large one buys reward with text that the base model would hardly write.

"""

ABOUT = (
    "A value guide for the packaged `stories` model: given a prefix it predicts the {what} of the "
    "response that `stories` will write, in standard deviations of its unguided responses (mean "
    "{mean:.4g}, deviation {std:.4g}). {use}"
)

RECIPE = (
    "A LoRA (rank {rank}, all linear layers) and a scalar head, initialised at zero, on `stories`; "
    "trained by TD(λ), λ = {lam:g}, γ = {gamma:g}, on {trained_on:,} responses of `stories` at "
    "temperature {temperature:g}, up to {max_tokens} tokens, to openings of the training stories. "
    "AdamW, peak learning rate {learning_rate:g}, {epochs}, batches of {batch_size}, {schedule} "
    "decay, average of the weights with decay {ema}. `python examples/stories/recipe.py` makes it "
    "again."
)

FIT = (
    "On {validation_episodes:,} responses to held-out openings the values explain "
    "{explained_variance:.0%} of the variance of {target}, over all prefixes (mean squared error "
    "{mse:.3f}); after the last token the error is {terminal_mse:.3f}.{note}"
)

WHAT = {
    "cheerfulness": {
        "what": "cheerfulness (mean VADER compound over its sentences)",
        "use": "Positive weights make stories more cheerful, negative ones gloomier.",
        "target": "the final reward",
        "note": "",
    },
    "brevity": {
        "what": "brevity (minus its number of tokens)",
        "use": (
            "The reward is paid token by token and centred, so a value says how many tokens are "
            "still to come; how many there were already is the same for all candidates of a step. "
            "Positive weights make stories shorter, negative ones longer."
        ),
        "target": "what is still to come",
        "note": (
            " (Part of that is responses that were cut at the limit, which no prefix announces.)"
        ),
    },
}


def write_base_card(folder: Path, pretraining_log: Path | None) -> None:
    """Write the base model's ``README.md``; without a log it is the model that comes copied."""
    training, quality = COPIED
    if pretraining_log is not None:
        epochs = [json.loads(line) for line in pretraining_log.read_text().splitlines()]
        best = min(epochs, key=lambda entry: entry["valid"])
        training, quality = (text.format(**best) for text in FROM_SCRATCH)
    card = STORIES.format(training=_wrap(training), quality=quality) + LICENCE
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_guide_cards(assets: Path) -> None:
    """Write ``README.md`` of every guide; those not measured say so."""
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    for folder in sorted(file.parent for file in assets.glob("*/guide_config.json")):
        card = guide_card(folder, record) + LICENCE
        (folder / "README.md").write_text(card, encoding="utf-8")


def guide_card(folder: Path, record: dict[str, Any]) -> str:
    """The card of one guide, without the licence."""
    config = GuideConfig.load(folder)
    hyper = dict(config.training["hyperparameters"])
    epochs = hyper.pop("epochs")
    lora = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    facts = {
        **WHAT[config.reward.name],
        **config.training,
        **hyper,
        "trained_on": config.training["rollouts"] - config.training["validation_episodes"],
        "epochs": "1 epoch" if epochs == 1 else f"{epochs} epochs",
        "mean": config.reward.mean,
        "std": config.reward.std,
        "rank": lora["r"],
        "lam": config.lam,
        "gamma": config.gamma,
    }
    return GUIDE.format(
        name=folder.name,
        about=_wrap(ABOUT.format(**facts)),
        recipe=_wrap(RECIPE.format(**facts)),
        fit=_wrap(FIT.format(**facts)),
        max_tokens=facts["max_tokens"],
        columns=COLUMNS,
        table=table(record, folder.name),
    )


def _wrap(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def table(record: dict[str, Any], name: str) -> str:
    """A guide's measured points as a markdown table, in the order of beta."""
    points = record.get("points", {}).get(name, {})
    if "0" not in points:
        return "Not measured yet: run `python examples/stories/report.py`.\n"
    lines = [
        "| β | reward (sd) | change | tokens | length | ended | KL per response | repeats |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    plain = points["0"]
    for beta, point in sorted(points.items(), key=lambda item: float(item[0])):
        reward, tokens, kl = (
            point[key] for key in ("reward_sd_units", "tokens", "kl_per_response")
        )
        gain = reward["mean"] - plain["reward_sd_units"]["mean"]
        gain_ci95 = math.hypot(reward["ci95"], plain["reward_sd_units"]["ci95"])
        length = tokens["mean"] / plain["tokens"]["mean"] - 1
        is_plain = point is plain
        lines.append(
            f"| {beta} | {reward['mean']:+.2f} ± {reward['ci95']:.2f} "
            f"| {'' if is_plain else f'{gain:+.2f} ± {gain_ci95:.2f}'} "
            f"| {tokens['mean']:.0f} ± {tokens['ci95']:.0f} "
            f"| {'' if is_plain else f'{length:+.0%}'} | {point['stopped']:.0%} "
            f"| {abs(kl['mean']):.1f} ± {kl['ci95']:.1f} | {point['repeated_4grams']:.1%} |"
        )
    return "\n".join(lines) + "\n"
