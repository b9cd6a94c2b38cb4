"""torch.mm and addmm with `out_dtype`, which torch has on GPUs alone: on the CPU, as tensor cores
compute them, so that TensorCoreProducts runs there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def on_cpu() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL", "CPU")
    try:
        library.impl("mm.dtype_out", mm)
        library.impl("addmm.dtype_out", addmm)
        yield
    finally:
        library._destroy()


def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    """Products of 16-bit operands are exact in fp32."""
    assert a.dtype == b.dtype != torch.float32 == out_dtype == out.dtype
    return torch.mm(a.float(), b.float(), out=out)


def addmm(
    start: Tensor,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    assert a.dtype == b.dtype != torch.float32 == out_dtype == out.dtype == start.dtype
    return torch.addmm(start, a.float(), b.float(), beta=beta, alpha=alpha, out=out)
