"""The CUDA kernels on the emulator, and the backend's row: what it takes and what it refuses.

Cross-entropy and decoding are held to the contract by the tests of every backend, test_losses.py
and test_decode.py; attention here, as long as it has no backward.
"""

from __future__ import annotations

import public
import pytest
import torch

from fastattn import reference
from fastattn.testing import (
    CASES,
    Case,
    assert_results_close,
    eager_attention,
    make_problem,
    to_float64,
)

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=public.name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_keeps_the_contract(
    emulated_arch: int, case: Case, dtype: torch.dtype, poisoned: None
) -> None:
    p = make_problem(case, dtype)
    if p.dropout_p > 0:
        p = p._replace(seed=public.drawn_seed())
    out, lse = public.attention(p, "cuda")
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous()
    results = [(out, lse), reference.attention(to_float64(p)), eager_attention(p)]
    names = ("out", "lse")
    assert_results_close(*(dict(zip(names, result, strict=True)) for result in results))
