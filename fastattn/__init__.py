"""fastattn: exact attention and cross-entropy through hand-written kernels, for PyTorch."""

from . import ops as _ops  # noqa: F401, registers torch.ops.fastattn.*, which the rest needs

# isort: split
from importlib import import_module as _import_module

from . import flash_attn
from .attention import attention, attention_varlen, explain
from .decode import attention_decode
from .losses import CrossEntropyLoss, LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy
from .modules import CausalSelfAttention
from .multihead_attention import MultiheadAttention, replace_modules
from .routing import replace_sdpa, sdpa
from .scaled_dot_product import scaled_dot_product_attention
from .weights import attention_entropy, attention_weights, plot_attention
from .when_imported import when_imported as _when_imported

# torch's FLOP counter learns of the operators with its import, which brings triton along.
_when_imported("torch.utils.flop_counter", lambda: _import_module(".flop_formulas", __name__))

__version__ = "0.1.0"

__all__ = [
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "attention",
    "attention_decode",
    "attention_entropy",
    "attention_varlen",
    "attention_weights",
    "cross_entropy",
    "explain",
    "flash_attn",
    "linear_cross_entropy",
    "plot_attention",
    "replace_modules",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "sdpa",
]
