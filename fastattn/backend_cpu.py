"""The CPU kernels' row in the backend table: `_C`, the library of csrc/cpu."""

from __future__ import annotations

import torch

from . import library
from .backends import KERNEL_DTYPES, Problem
from .compiled import Compiled

_compiled = Compiled(lambda: torch.ops.fastattn_C)
attn_fwd = _compiled.attn_fwd
attn_bwd = _compiled.attn_bwd
attn_decode = _compiled.attn_decode
cross_entropy_fwd = _compiled.cross_entropy_fwd
cross_entropy_bwd = _compiled.cross_entropy_bwd


def unusable() -> str | None:
    return library.load_error()


def refuses(p: Problem, asked: bool) -> str | None:
    first = p[0]
    if first.device.type != "cpu":
        return f"the tensors are on {first.device}, not the CPU"
    if first.dtype not in KERNEL_DTYPES:
        return f"dtype {first.dtype} has no kernel, only float32, bfloat16 and float16 have"
    return None
