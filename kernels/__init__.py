"""The ops of guided decoding. Import the package as ``fastguide.kernels``.

``reference`` defines every op in PyTorch and is the specification; ``triton`` holds the GPU
kernels and ``native`` calls the C++ of ``csrc/`` on the CPU. ``ops`` registers the ops with torch
and checks their arguments, ``dispatch`` chooses who does the work by the tensors given.
"""

# Python started in the source tree finds this folder as a top-level package too, where transformers
# looks for another one of this name. It must find nothing: a second copy would register ops twice.
if __name__ == "fastguide.kernels":
    from . import dispatch, native, reference, triton
    from .ops import (
        guide_sample,
        lora_rows,
        sample_tail,
        td_lambda,
        topk_logsumexp,
        tree_attention,
    )
    from .reference import GuidedSample, TreeLayout

__all__ = [
    "GuidedSample",
    "TreeLayout",
    "dispatch",
    "guide_sample",
    "lora_rows",
    "native",
    "reference",
    "sample_tail",
    "td_lambda",
    "topk_logsumexp",
    "tree_attention",
    "triton",
]
