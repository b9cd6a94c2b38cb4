"""Matrix products with fp32 sums: what linear cross-entropy is made of besides its kernel.

They are torch's unless a backend has its own `products()`, where those are faster.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TorchProducts:
    """torch's, in fp32 whatever the operands' dtype."""

    def operand(self, t: Tensor) -> Tensor:
        """`t` as `multiply` takes it; worth keeping where it's used more than once."""
        return t.float()

    def gradient(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """In the memory of `logits` (N, V) fp32, what will hold their gradient for `multiply`.

        `dtype` is that of the matrices which the gradient is multiplied by.
        """
        return logits

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """out (M, N) fp32 = a (M, K) @ b (K, N), or += with `accumulate`."""
        # beta = 0 ignores what fresh memory holds.
        torch.addmm(out, a, b, beta=int(accumulate), out=out)


class TensorCoreProducts(TorchProducts):
    """torch's on a GPU: bf16 and fp16 go through tensor cores, with sums in fp32.

    fp32 beside bf16 is rounded to it; fp16, where small gradients would vanish, becomes fp32.
    """

    def operand(self, t: Tensor) -> Tensor:
        return t

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        if b.dtype == torch.bfloat16:
            a = a.to(b.dtype)
        if torch.float32 in (a.dtype, b.dtype):
            super().multiply(a.float(), b.float(), out, accumulate)
        elif accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)


def torchs(device: torch.device) -> TorchProducts:
    return TensorCoreProducts() if device.type == "cuda" else TorchProducts()
