"""Training: collections of responses, value models, classifiers of prefixes, reward models."""

from typing import TYPE_CHECKING

from fastguide.lazy import lazily

if TYPE_CHECKING:
    from fastguide.train.collect import CollectConfig as CollectConfig, collect as collect
    from fastguide.train.episodes import Episode as Episode
    from fastguide.train.fudge import (
        FudgeConfig as FudgeConfig,
        FudgeTrainer as FudgeTrainer,
    )
    from fastguide.train.guides import (
        early_stopping as early_stopping,
        sweep as sweep,
        train_guide as train_guide,
    )
    from fastguide.train.labels import label as label, load_episodes as load_episodes
    from fastguide.train.preferences import (
        train_reward as train_reward,
        train_sft as train_sft,
    )
    from fastguide.train.validation import (
        make_validation as make_validation,
        validate as validate,
    )
    from fastguide.train.value import (
        ValueConfig as ValueConfig,
        ValueTrainer as ValueTrainer,
    )

_HOME = {
    "CollectConfig": "collect",
    "collect": "collect",
    "label": "labels",
    "load_episodes": "labels",
    "Episode": "episodes",
    "FudgeConfig": "fudge",
    "FudgeTrainer": "fudge",
    "early_stopping": "guides",
    "sweep": "guides",
    "train_guide": "guides",
    "train_reward": "preferences",
    "train_sft": "preferences",
    "make_validation": "validation",
    "validate": "validation",
    "ValueConfig": "value",
    "ValueTrainer": "value",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = lazily(__name__, _HOME)
