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

    def logits(self, rows: int, vocab: int, like: Tensor) -> Tensor:
        """Memory for (rows, V) fp32 logits, on the device of `like`."""
        return like.new_empty((rows, vocab), dtype=torch.float32)

    def gradient_bytes(self, dtype: torch.dtype) -> int:
        """What `gradient` takes for an element beside the logits' memory."""
        return 0

    def gradient(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """What will hold the gradient of `logits` (N, V) fp32 for `multiply`, as a rule in theirs.

        `dtype` is that of the matrices which the gradient is multiplied by.
        """
        return logits

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """out (M, N) fp32 = a (M, K) @ b (K, N), or += with `accumulate`."""
        # beta = 0 ignores what fresh memory holds.
        torch.addmm(out, a, b, beta=int(accumulate), out=out)


class TensorCoreProducts(TorchProducts):
    """torch's on a GPU: two operands of bf16 or fp16 go through tensor cores, with sums in fp32."""

    def operand(self, t: Tensor) -> Tensor:
        return t

    def logits(self, rows: int, vocab: int, like: Tensor) -> Tensor:
        return _aligned_rows(rows, vocab, torch.float32, like.device)

    def gradient_bytes(self, dtype: torch.dtype) -> int:
        return 0 if dtype == torch.float32 else dtype.itemsize

    def gradient(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """In memory of its own and of `dtype`: blocks that write a row still read it elsewhere."""
        if dtype == torch.float32:
            return logits
        rows, vocab = logits.shape
        return _aligned_rows(rows, vocab, dtype, logits.device)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        if a.dtype == torch.float32:
            super().multiply(a, b, out, accumulate)
        elif accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)


def _aligned_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows that start at multiples of 16 bytes: from others cuBLAS' fast kernels don't load."""
    elements = 16 // dtype.itemsize
    apart = -(-columns // elements) * elements
    return torch.empty((rows, apart), dtype=dtype, device=device)[:, :columns]


def torchs(device: torch.device) -> TorchProducts:
    return TensorCoreProducts() if device.type == "cuda" else TorchProducts()
