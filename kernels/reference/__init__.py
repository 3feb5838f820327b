"""The PyTorch definition of every op: the specification that all other implementations follow.

Notation (one row = one request at one step): logits divided by the temperature are ``z``,
``A = logsumexp(z)`` over the vocabulary, ``b`` the bonus that a rule gives each candidate.
Each function runs on any device, allocates its outputs (contiguous), mutates nothing and is
deterministic.
"""

from .attention import DenseTree, TreeLayout, dense_tree, tree_attention
from .lora import lora_rows
from .returns import td_lambda
from .sampling import (
    FILL,
    FILL_DROP,
    FILL_MEAN,
    FILL_NONE,
    GREEDY,
    LOG_SIGMOID,
    TAIL,
    GuidedSample,
    composed_scores,
    guide_sample,
    guided_values,
    philox_uniform,
)
from .vocabulary import sample_tail, topk_logsumexp

__all__ = [
    "FILL",
    "FILL_DROP",
    "FILL_MEAN",
    "FILL_NONE",
    "GREEDY",
    "LOG_SIGMOID",
    "TAIL",
    "DenseTree",
    "GuidedSample",
    "TreeLayout",
    "composed_scores",
    "dense_tree",
    "guide_sample",
    "guided_values",
    "lora_rows",
    "philox_uniform",
    "sample_tail",
    "td_lambda",
    "topk_logsumexp",
    "tree_attention",
]
