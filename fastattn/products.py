"""Matrix products with fp32 sums: what linear cross-entropy is made of besides its kernel.

They are torch's unless a backend has its own `PRODUCTS`, where those are faster.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TorchProducts:
    """Everything in fp32, whatever the operands' dtype."""

    def operand(self, t: Tensor) -> Tensor:
        """`t` as `multiply` takes it; worth keeping where it's used more than once."""
        return t.float()

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """out (M, N) fp32 = a (M, K) @ b (K, N), or += with `accumulate`."""
        # beta = 0 ignores what fresh memory holds.
        torch.addmm(out, a, b, beta=int(accumulate), out=out)
