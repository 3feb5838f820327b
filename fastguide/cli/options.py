"""The options of the commands: types, names and help. What they mean is in ``arguments.py``."""

from typing import Annotated, Any

import typer


def _option(panel: str, help: str, *names: str, **kwargs: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}; allowed are whole numbers") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}; allowed are numbers") from error


_COUNT: Any = {"metavar": "COUNT", "parser": _whole}
_SEED: Any = {"metavar": "NUMBER", "parser": _whole}
_STRENGTH: Any = {"metavar": "NUMBER", "parser": _number}
_MODEL, _RULE, _SAMPLING, _OUTPUT = "Model and guides", "Rule", "Sampling", "Output"

Prompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROMPT", help="Texts to continue; - reads standard input."),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help="Read prompts from a file, one per line (.jsonl: texts or objects), or -.",
    ),
]
Chat = Annotated[
    bool,
    _option(
        _MODEL,
        "Prompts are what a user says: the model's chat template is put around each.",
        "--chat",
    ),
]

Model = Annotated[
    str | None,
    _option(_MODEL, "Base model; left out: the packaged story model.", metavar="PATH|HUB-ID"),
]
Guides = Annotated[
    list[str] | None,
    _option(
        _MODEL,
        "A guide and its weight (1); repeat for more. Packaged: cheerful, brief.",
        "--guide",
        metavar="NAME[=PATH][:WEIGHT]",
    ),
]
GuideBase = Annotated[
    str | None,
    _option(_MODEL, "Base model of NAME=PATH guides, instead of their own.", metavar="PATH|HUB-ID"),
]
Device = Annotated[str | None, _option(_MODEL, "cpu, cuda or cuda:N.", metavar="NAME")]
Dtype = Annotated[
    str | None, _option(_MODEL, "float32, bfloat16, float16 or auto.", metavar="NAME")
]
TrustRemoteCode = Annotated[
    bool, _option(_MODEL, "Run code shipped with checkpoints.", "--trust-remote-code")
]

RuleName = Annotated[
    str | None,
    _option(
        _RULE,
        "How scores steer; left out: vas with guides, else none.",
        "--rule",
        metavar="vas|args|fudge|none",
    ),
]
Beta = Annotated[
    float | None,
    _option(_RULE, "Strength of vas (1); below 0 steers away.", **_STRENGTH),
]
Weight = Annotated[float | None, _option(_RULE, "Strength of args (1.5), fudge (1).", **_STRENGTH)]
K = Annotated[
    int | None,
    _option(_RULE, "Tokens scored per step (20, args 10).", "--k", **_COUNT),
]
CandidateMass = Annotated[
    float | None,
    _option(_RULE, "Score only the likeliest tokens that hold this share (1).", **_STRENGTH),
]
Fill = Annotated[
    str | None, _option(_RULE, "vas: score of all other tokens.", metavar="mean|none|drop")
]
Form = Annotated[
    str | None, _option(_RULE, "args: form of the score.", metavar="additive|interpolated")
]

Temperature = Annotated[
    float,
    _option(_SAMPLING, "0 takes the best token at every step.", **_STRENGTH),
]
Warmth = Annotated[float, _option(_SAMPLING, "Above 0.", "--temperature", **_STRENGTH)]
MaxTokens = Annotated[int, _option(_SAMPLING, "Most new tokens.", **_COUNT)]
Stop = Annotated[
    list[str] | None,
    _option(_SAMPLING, "End before this text; \\n is a line break.", metavar="TEXT"),
]
Samples = Annotated[int, _option(_SAMPLING, "Samples per prompt.", "--n", **_COUNT)]
BestOf = Annotated[
    int | None,
    _option(_SAMPLING, "Sample so many, print the one with the highest --reward.", **_COUNT),
]
Seed = Annotated[int | None, _option(_SAMPLING, "Left out: another each time.", **_SEED)]

Stream = Annotated[bool, _option(_OUTPUT, "Print text as it is decoded.", "--stream")]
AsJson = Annotated[bool, _option(_OUTPUT, "One JSON object per completion.", "--json")]
Output = Annotated[str | None, _option(_OUTPUT, "Write to a file.", metavar="FILE")]

_DATA, _BACKBONE, _TRAINING = "Data", "Backbone", "Training"

Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Where the collection lies.")]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="[WEIGHT*]REWARD",
        help=(
            "cheerfulness, vader, length, brevity, classifier:PATH, regex:PATTERN, "
            "checker:COMMAND or MODULE:FUNCTION; repeat for a sum."
        ),
    ),
]
Labels = Annotated[str, typer.Option("--labels", metavar="NAME", help="Name of the rewards.")]
SearchRewards = Annotated[
    list[str] | None,
    _option(_SAMPLING, "With --best-of: as in collect.", "--reward", metavar="[WEIGHT*]REWARD"),
]
JudgedTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Judge the first tokens only.", **_COUNT),
]
CollectSeed = Annotated[int, _option(_SAMPLING, "Another seed, another outcome.", **_SEED)]
ShardPrompts = Annotated[int, _option(_SAMPLING, "Prompts per shard.", "--shard", **_COUNT)]

_ENGINE = "Speed and memory"
MaxRows = Annotated[int, _option(_ENGINE, "Responses sampled together.", **_COUNT)]
KvMemory = Annotated[
    str | None,
    _option(
        _ENGINE,
        "For keys and values: 4G, 512M, bytes, or a share of free memory such as 0.5.",
        metavar="SIZE",
    ),
]
Way = Annotated[
    str,
    _option(
        _ENGINE,
        "How guides on the model's own weights run.",
        metavar="auto|one-pass|two-phase",
    ),
]
TensorParallel = Annotated[
    bool,
    _option(_ENGINE, "Share the model out among torchrun's processes.", "--tensor-parallel"),
]
Graphs = Annotated[bool, _option(_ENGINE, "On a GPU, replay steps as CUDA graphs.", "--graphs")]
Compile = Annotated[bool, _option(_ENGINE, "Have torch.compile fuse small ops.", "--compile")]

_RAY = "Ray"
Ray = Annotated[bool, _option(_RAY, "Sample and judge as a Ray Data pipeline.", "--ray")]
Workers = Annotated[int, _option(_RAY, "Engines, and judges, at once.", **_COUNT)]
Gpus = Annotated[float, _option(_RAY, "GPUs of each; 0 is the CPU.", **_STRENGTH)]

Data = Annotated[str, typer.Argument(metavar="DATA", help="Folder of a collection.")]
Out = Annotated[str, typer.Option("--out", metavar="FOLDER", help="Where the guide goes.")]
ModelOut = Annotated[str, typer.Option("--out", metavar="FOLDER", help="Where the model goes.")]
HeldOutRows = Annotated[
    float, _option(_TRAINING, "Share of rows to validate on.", "--held-out", **_STRENGTH)
]
Backbone = Annotated[
    str | None,
    _option(_BACKBONE, "Left out: the policy itself.", "--model", metavar="PATH|HUB-ID"),
]
TrainedModel = Annotated[
    str | None,
    _option(_BACKBONE, "Left out: the packaged story model.", "--model", metavar="PATH|HUB-ID"),
]
Pairs = Annotated[
    list[str], typer.Argument(metavar="PAIRS", help="JSON lines or Parquet: chosen, rejected.")
]
Texts = Annotated[list[str], typer.Argument(metavar="TEXTS", help="JSON lines or Parquet: text.")]
PairsRank = Annotated[
    int | None,
    _option(_BACKBONE, "Rank of a LoRA; left out: all weights.", "--lora-rank", **_COUNT),
]
MaxLength = Annotated[int, _option(_TRAINING, "Most tokens of a text.", **_COUNT)]
LoraRank = Annotated[
    int | None, _option(_BACKBONE, "Rank of the LoRA that is trained (16).", **_COUNT)
]
LoraAlpha = Annotated[
    int | None, _option(_BACKBONE, "Scale of the LoRA; left out: its rank.", **_COUNT)
]
BackboneDtype = Annotated[
    str | None,
    _option(
        _BACKBONE, "Of its weights (float32): bfloat16, float16 or auto.", "--dtype", metavar="NAME"
    ),
]
BackboneCode = Annotated[
    bool, _option(_BACKBONE, "Run code shipped with checkpoints.", "--trust-remote-code")
]
Full = Annotated[bool, _option(_BACKBONE, "Train all weights, without a LoRA.", "--full")]
Freeze = Annotated[bool, _option(_BACKBONE, "Train the head alone.", "--freeze")]
Head = Annotated[str, _option(_BACKBONE, "Head on the hidden states.", metavar="linear|mlp")]
Quantize = Annotated[
    str | None, _option(_BACKBONE, "Bits of the backbone's weights.", metavar="int8|int4")
]
Lam = Annotated[float, _option(_TRAINING, "λ of the targets, 0 to 1.", "--lam", **_STRENGTH)]
Gamma = Annotated[float, _option(_TRAINING, "Discount, 0 to 1.", **_STRENGTH)]
LearningRate = Annotated[float, _option(_TRAINING, "Peak, after a warm-up.", **_STRENGTH)]
Epochs = Annotated[float, _option(_TRAINING, "Passes over the data.", **_STRENGTH)]
BatchSize = Annotated[int, _option(_TRAINING, "Responses per step and device.", **_COUNT)]
Ema = Annotated[
    float | None, _option(_TRAINING, "Keep an average of the weights (0.99).", **_STRENGTH)
]
BFloat16 = Annotated[bool, _option(_TRAINING, "Mixed precision.", "--bf16")]
Patience = Annotated[
    int | None,
    _option(_TRAINING, "Stop after so many epochs without a gain, keep the best.", **_COUNT),
]
HeldOut = Annotated[float, _option(_TRAINING, "Share of prompts to validate on.", **_STRENGTH)]
ValidationSet = Annotated[
    str | None,
    _option(
        _TRAINING, "Measure against what fastguide validate made.", "--validation", metavar="FOLDER"
    ),
]
Set = Annotated[
    list[str] | None,
    _option(
        _TRAINING,
        "Any of transformers' TrainingArguments; lr is the learning rate.",
        "--set",
        metavar="NAME=VALUE",
    ),
]
Sweep = Annotated[
    list[str] | None,
    _option(
        _TRAINING, "Train with each value, keep the best.", "--sweep", metavar="NAME=VALUE,VALUE"
    ),
]
Above = Annotated[
    float | None,
    _option(_DATA, "Raw reward above which a response counts (median).", **_STRENGTH),
]

GuideFolders = Annotated[
    list[str] | None, typer.Argument(metavar="GUIDE", help="Guide folders, hub ids or names.")
]
ValidationOut = Annotated[
    str, typer.Option("--set", metavar="FOLDER", help="Where the validation set lies, or goes.")
]
ValidationData = Annotated[
    str | None, typer.Option("--data", metavar="FOLDER", help="Collection to make it from.")
]
ValidationPrompts = Annotated[
    int, typer.Option("--prompts", help="Prompts whose responses are cut in half.", **_COUNT)
]
Completions = Annotated[int, typer.Option(help="Ways each half is finished.", **_COUNT)]

StudyFile = Annotated[str, typer.Argument(metavar="STUDY", help="A YAML file.")]
StudyOut = Annotated[str, typer.Option("--out", metavar="FOLDER", help="Where results go.")]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw them (matplotlib).")]

DemoPrompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="A prompt of your own; repeat for more."),
]
DemoSamples = Annotated[int, typer.Option("--n", help="Samples per prompt.", **_COUNT)]
DemoBeta = Annotated[float, typer.Option(help="Strength of the guides.", **_STRENGTH)]
DemoSeed = Annotated[int, typer.Option(help="Another seed, other stories.", **_SEED)]
DemoMaxTokens = Annotated[int, typer.Option("--max-tokens", help="Most new tokens.", **_COUNT)]
