"""The ops of guided decoding. Import the package as ``fastguide.kernels``.

``reference`` defines every op in PyTorch and is the specification, ``native`` holds the CPU ops of
``csrc/``, and ``dispatch`` chooses between them by the tensor it is given.
"""

from . import dispatch, native, reference
from .dispatch import topk_logsumexp

__all__ = ["dispatch", "native", "reference", "topk_logsumexp"]
