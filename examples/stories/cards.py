"""Model cards of the packaged models, written from what their configs and the record say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastguide.models.guide_config import GuideConfig

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs/results/stories.json"

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

Trained on 5,122 short stories (1.09 M tokens; pieces of TinyStories, cleaned) and on 7,500 stories
sampled at temperature 0.9 from karpathy's `stories260K` model (MIT): about an hour on two CPU
cores, AdamW (0.9, 0.95), weight decay 0.1, peak learning rate 2e-3 then 1.2e-3, cosine decay,
residual dropout 0.1, rows of 256 tokens, best validation checkpoint. `python
examples/stories/recipe.py --from-scratch` trains a model of this shape on the stories alone.

## Quality

On 250 held-out stories: 0.540 nats per character, 2.03 nats per token. Fluent from sentence to
sentence, loses the plot after a paragraph. For tests and demonstrations only.

"""

GUIDE = """# {name}

A value guide for the packaged `stories` model: given a prefix it predicts the {what} of the
response that `stories` will write, in standard deviations of its unguided responses
(mean {mean:.4g}, deviation {std:.4g}). {use}

## Recipe

A LoRA (rank {rank}, all linear layers) and a scalar head, initialised at zero, on `stories`;
trained by TD(λ), λ = {lam:g}, γ = {gamma:g}, on {rollouts:,} responses of `stories` at temperature
{temperature:g}, up to {max_tokens} tokens, to openings of the training stories. {hyper}
`python examples/stories/recipe.py` makes it again.

On {validation:,} responses to held-out openings the values explain {explained:.0%} of the variance
of the final reward, averaged over all prefixes (mean squared error {mse:.3f}); after the last
token the error is {terminal:.3f}.{note}

## Measured

Held-out prompts: first sentences of 64 validation stories, four responses each (256 per row), VAS
with k = 20, temperature 0.7, up to {max_tokens} tokens; ± is a 95 % interval. KL is the sum over a
response, in nats.

{table}
At large |β| the text pays for the reward: KL and the share of repeated 4-grams grow with it.

"""

NOTE = {
    "brevity": (
        " (Part of that is the responses that were cut at the limit,\nwhich no prefix announces.)"
    )
}

WHAT = {
    "cheerfulness": (
        "cheerfulness (mean VADER compound over its sentences)",
        "Positive weights make stories more cheerful, negative ones gloomier.",
    ),
    "brevity": (
        "brevity (minus its number of tokens)",
        "The reward is paid token by token and centred, so a value says how many tokens are still\n"
        "to come; how many there were already is the same for all candidates of a step. Positive\n"
        "weights make stories shorter, negative ones longer.",
    ),
}


def write_cards(assets: Path) -> None:
    """Write ``README.md`` of every packaged model; unmeasured guides say so."""
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    (assets / "stories/README.md").write_text(STORIES + LICENCE, encoding="utf-8")
    for folder in sorted(file.parent for file in assets.glob("*/guide_config.json")):
        text = guide_card(folder, record)
        (folder / "README.md").write_text(text + LICENCE, encoding="utf-8")


def guide_card(folder: Path, record: dict[str, Any]) -> str:
    """The card of one guide, without the licence."""
    config = GuideConfig.load(folder)
    facts = config.training
    rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    hyper = facts["hyperparameters"]
    what, use = WHAT[config.reward.name]
    return GUIDE.format(
        name=folder.name,
        what=what,
        use=use,
        mean=config.reward.mean,
        std=config.reward.std,
        rank=rank,
        lam=config.lam,
        gamma=config.gamma,
        rollouts=facts["rollouts"],
        temperature=facts["temperature"],
        max_tokens=facts["max_tokens"],
        hyper=(
            f"AdamW, peak learning rate {hyper['learning_rate']:g}, {hyper['epochs']} epochs of "
            f"batches of {hyper['batch_size']}, {hyper['schedule']} decay, average of weights "
            f"with decay {hyper['ema']}."
        ),
        validation=facts["validation_episodes"],
        explained=facts["explained_variance"],
        mse=facts["mse"],
        terminal=facts["terminal_mse"],
        note=NOTE.get(config.reward.name, ""),
        table=table(record, folder.name),
    )


def table(record: dict[str, Any], name: str) -> str:
    """A guide's measured points as a markdown table, in the order of beta."""
    points = record.get("points", {}).get(name, {})
    if not points:
        return "Not measured yet: run `python examples/stories/report.py`.\n"
    lines = [
        "| β | reward (sd) | tokens | length | ended | KL per response | repeated 4-grams |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for beta, point in sorted(points.items(), key=lambda item: float(item[0])):
        reward, tokens, kl = (
            point[key] for key in ("reward_sd_units", "tokens", "kl_per_response")
        )
        change = tokens["mean"] / points["0"]["tokens"]["mean"] - 1 if "0" in points else 0.0
        lines.append(
            f"| {beta} | {reward['mean']:+.2f} ± {reward['ci95']:.2f} "
            f"| {tokens['mean']:.0f} ± {tokens['ci95']:.0f} | {change:+.0%} "
            f"| {point['stopped']:.0%} | {kl['mean']:.1f} ± {kl['ci95']:.1f} "
            f"| {point['repeated_4grams']:.1%} |"
        )
    return "\n".join(lines) + "\n"
