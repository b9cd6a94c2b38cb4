"""fastattn/check.py's public functions of a problem, for tests: what is refused is skipped."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn import backends, check
from fastattn.backends import KERNEL_DTYPES
from fastattn.check import SEED, cross_entropy, decode, drawn_seed, linear_cross_entropy
from fastattn.problem import AttentionProblem

__all__ = ["KERNEL_DTYPES", "SEED", "cross_entropy", "decode", "drawn_seed", "linear_cross_entropy"]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def skip_if_refused(p: backends.Problem, backend: str | None) -> None:
    """sm_75 has no attention in bfloat16, as tests/test_cuda.py says."""
    rows = (row for row in backends.TABLE if row.name == backend == "cuda")
    for row in rows:
        if (reason := row.refuses(p, asked=True)) is not None:
            pytest.skip(reason)


def attention(p: AttentionProblem, backend: str | None = None) -> tuple[Tensor, Tensor]:
    skip_if_refused(p, backend)
    return check.attention(p, backend)


def attention_on(backend: str) -> Callable[[AttentionProblem], tuple[Tensor, Tensor]]:
    return functools.partial(attention, backend=backend)
