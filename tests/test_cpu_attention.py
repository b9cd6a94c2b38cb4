"""The CPU kernels' attention where values are no numbers; in every dtype: bf16 may go in pairs."""

from __future__ import annotations

import cpu_isa
import hidden_values
import public
import pytest
import torch

from fastattn import library
from fastattn.cases import Case

pytestmark = pytest.mark.skipif(library.load_error() is not None, reason="no kernels")


@pytest.mark.parametrize("dtype", public.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("value", hidden_values.VALUES, ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("case, row", hidden_values.CASES, ids=str)
def test_hidden_values_reach_nobody(
    case: Case, row: int, where: str, value: float, dtype: torch.dtype
) -> None:
    hidden_values.check_attention(case, row, where, value, dtype, "cpu")


@pytest.mark.parametrize("isa", cpu_isa.others())
def test_every_instruction_set(isa: str) -> None:
    cpu_isa.run_file(__file__, isa, "not instruction_set")
