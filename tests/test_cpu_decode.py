"""The CPU decode kernels: what is theirs alone. Decoding's contract is in test_decode.py."""

from __future__ import annotations

from dataclasses import replace

import cpu_isa
import pytest
import torch
from torch import Tensor

from fastattn import backend_cpu, library
from fastattn.problem import DecodeProblem
from fastattn.testing import DECODE_CASES, DecodeCase, check_decode, make_decode_problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAUSAL = (-1, 0)
# Lengths on both sides of a block's 64 keys, a chunk's 512, and more queries than an item holds.
BLOCKS = DecodeCase("blocks", (63, 64, 65, 128), capacity=128, heads=(6, 2))
CHUNKS = DecodeCase("chunks", (511, 512, 513, 1700), capacity=1700, heads=(8, 2), head_dim=64)
PREFILL = DecodeCase("prefill", (0, 100), 131, 131, 231, (6, 2), window=CAUSAL)
WIDE = DecodeCase("wide-group", (90,), 2, capacity=96, heads=(142, 2), window=(20, 3))
LONG = DecodeCase("long", (6_000,), capacity=6_000, heads=(4, 1), head_dim=64)
CASES = (*DECODE_CASES, BLOCKS, CHUNKS, PREFILL, WIDE, LONG)

if (reason := library.load_error()) is not None:
    pytest.skip(reason, allow_module_level=True)


def solve(p: DecodeProblem) -> tuple[Tensor, Tensor]:
    out, lse = backend_cpu.attn_decode(p)
    return out, lse


def assert_same_bits(ours: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(ours, other, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_within_the_bound(case: DecodeCase, dtype: torch.dtype) -> None:
    check_decode(solve, make_decode_problem(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(1, 1), (31, 33), (64, 64), (100, 20), (160, 256)])
def test_any_head_dim(dims: tuple[int, int], dtype: torch.dtype) -> None:
    case = DecodeCase(
        "dims", (70, 3), capacity=70, heads=(7, 1), head_dim=dims[0], head_dim_v=dims[1]
    )
    check_decode(solve, make_decode_problem(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (CHUNKS, replace(CHUNKS, seqlen_q=3, window=(900, 0))), ids=str)
def test_splits_and_threads_change_no_bit(case: DecodeCase, dtype: torch.dtype) -> None:
    p, threads = make_decode_problem(case, dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = solve(p)
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            for num_splits in (0, 1, 2, 3, 100):
                assert_same_bits(solve(p._replace(num_splits=num_splits)), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_no_bit(dtype: torch.dtype) -> None:
    p = make_decode_problem(CHUNKS, dtype)
    heads_first = {
        name: getattr(p, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("k_cache", "v_cache")
    }
    both = torch.stack((p.k_cache, p.v_cache), dim=3)  # K and V of a head side by side
    together = {"k_cache": both[:, :, :, 0], "v_cache": both[:, :, :, 1]}
    spread = torch.zeros(*p.q.shape[:3], p.q.shape[3] + 3, dtype=dtype)
    spread[..., 1:-2] = p.q
    for changed in (heads_first, together, {"q": spread[..., 1:-2]}):
        assert_same_bits(solve(p._replace(**changed)), solve(p))


@pytest.mark.parametrize("isa", cpu_isa.others())
def test_every_instruction_set_passes_these_tests(isa: str) -> None:
    cpu_isa.run_file(__file__, isa, "not instruction_set and not long")
