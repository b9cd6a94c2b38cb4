"""The CPU kernels' row in the backend table: `_C`, the library of csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from . import library
from .backends import KERNEL_DTYPES, Problem
from .compiled import Compiled
from .products import TorchProducts

_compiled = Compiled(lambda: torch.ops.fastattn_C)
attn_fwd = _compiled.attn_fwd
attn_entropy = _compiled.attn_entropy
attn_bwd = _compiled.attn_bwd
attn_decode = _compiled.attn_decode
cross_entropy_fwd = _compiled.cross_entropy_fwd
cross_entropy_bwd = _compiled.cross_entropy_bwd


class OwnProducts(TorchProducts):
    """Operands as they are; two of bf16, or fp32 by bf16, are multiplied in bf16."""

    def operand(self, t: Tensor) -> Tensor:
        return t if 1 in t.stride() else t.contiguous()

    def gradient(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """Products with bf16 would round it to bf16 whenever they read it: that is done once."""
        if dtype != torch.bfloat16:
            return logits
        return logits.view(dtype)[:, : logits.shape[1]]

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        torch.ops.fastattn_C.matmul(a, b, out, accumulate)


def own_products(device: torch.device) -> TorchProducts | None:
    # On AMD's AVX-512 processors, where torch's fp32 product (MKL's) reaches half of what the
    # processor can do; elsewhere it is the faster one.
    own = device.type == "cpu" and library.cpu_isa() == "avx512_bf16"
    return OwnProducts() if own else None


def unusable() -> str | None:
    return library.load_error()


def refuses(p: Problem, asked: bool) -> str | None:
    first = p[0]
    if first.device.type != "cpu":
        return f"the tensors are on {first.device}, not the CPU"
    if first.dtype not in KERNEL_DTYPES:
        return f"dtype {first.dtype} has no kernel, only float32, bfloat16 and float16 have"
    return None
