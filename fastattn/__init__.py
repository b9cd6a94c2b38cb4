"""fastattn: exact attention and cross-entropy through hand-written kernels, for PyTorch."""

from . import ops as _ops  # noqa: F401, registers torch.ops.fastattn.*
from .attention import (
    attention,
    attention_varlen,
    explain,
    scaled_dot_product_attention,
)
from .decode import attention_decode
from .losses import CrossEntropyLoss, LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy
from .modules import CausalSelfAttention

__version__ = "0.1.0"

__all__ = [
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "attention",
    "attention_decode",
    "attention_varlen",
    "cross_entropy",
    "explain",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
]
