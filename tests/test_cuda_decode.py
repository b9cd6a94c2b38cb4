"""The CUDA decode kernels, run by the emulator: what is theirs alone.

Decoding's contract is in test_decode.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import emulated
import pytest
import torch
from emulator.runtime import Library
from torch import Tensor

from fastattn.compiled import Compiled
from fastattn.problem import DecodeProblem
from fastattn.testing import DECODE_CASES, DecodeCase, check_decode, make_decode_problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAUSAL = (-1, 0)
# Lengths on both sides of a split's least 64 keys and of what a block takes at a time; more rows
# than a tile has.
LENGTHS = DecodeCase("lengths", (15, 16, 17, 63, 64, 65, 129), capacity=130, heads=(6, 2))
PREFILL = DecodeCase("prefill", (0, 20), 37, 37, 60, (6, 2), window=CAUSAL)
WIDE = DecodeCase("wide-group", (90,), 2, capacity=96, heads=(34, 2), window=(20, 3))
LONG = DecodeCase("long", (700, 300), capacity=700, heads=(5, 1), head_dim=64)
CASES = (*DECODE_CASES, LENGTHS, PREFILL, WIDE, LONG)

if (reason := emulated.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def emulator() -> Iterator[Library]:
    torch.ops.load_library(str(emulated.build()))
    emulator = Library(emulated.build())
    yield emulator
    emulator.set_options()


KERNELS = Compiled(lambda: torch.ops.fastattn_emulated)


def solve(p: DecodeProblem) -> tuple[Tensor, Tensor]:
    out, lse = KERNELS.attn_decode(p)
    return out, lse


def assert_same_bits(ours: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(ours, other, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_within_the_bound(case: DecodeCase, dtype: torch.dtype, poisoned: None) -> None:
    check_decode(solve, make_decode_problem(case, dtype))


@pytest.mark.parametrize("arch", (75, 90))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", ((3, 3), (8, 1)), ids=str)
def test_every_architecture(
    heads: tuple[int, int], dtype: torch.dtype, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_EMULATE_ARCH", str(arch))
    case = replace(DECODE_CASES[-1], heads=heads, head_dim=72)
    check_decode(solve, make_decode_problem(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(1, 1), (31, 33), (64, 64), (100, 20), (128, 128), (160, 256)])
@pytest.mark.parametrize("heads", ((2, 2), (7, 1)), ids=str)
def test_any_head_dim(heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> None:
    case = DecodeCase("dims", (70, 3), capacity=70, heads=heads, head_dim=dims[0])
    check_decode(solve, make_decode_problem(replace(case, head_dim_v=dims[1]), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", (1, 3, 7, 1000))
@pytest.mark.parametrize("case", (LONG, replace(LONG, seqlen_q=3, window=(400, 0))), ids=str)
def test_any_number_of_splits(case: DecodeCase, num_splits: int, dtype: torch.dtype) -> None:
    check_decode(solve, make_decode_problem(replace(case, num_splits=num_splits), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (LENGTHS, DECODE_CASES[-1]), ids=str)
def test_schedules_change_no_bit(case: DecodeCase, dtype: torch.dtype, emulator: Library) -> None:
    p = make_decode_problem(case, dtype)
    emulator.set_options()
    expected = solve(p)
    for options in ("eager", "seed=1", "random,seed=2", "random,seed=3"):
        emulator.set_options(options)
        assert_same_bits(solve(p), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", ((2, 2), (6, 2)), ids=str)
def test_strides_change_no_bit_but_alignment_may(
    heads: tuple[int, int], dtype: torch.dtype
) -> None:
    p = make_decode_problem(replace(LENGTHS, heads=heads), dtype)
    expected = solve(p)

    def spread(x: Tensor) -> Tensor:  # rows that start one element late and are longer
        longer = torch.full((*x.shape[:3], x.shape[3] + 3), math.nan, dtype=dtype)
        longer[..., 1:-2] = x
        return longer[..., 1:-2]

    heads_first = {
        name: getattr(p, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("k_cache", "v_cache")
    }
    both = torch.stack((p.k_cache, p.v_cache), dim=3)  # K and V of a head side by side
    together = {"k_cache": both[:, :, :, 0], "v_cache": both[:, :, :, 1]}
    apart = ({name: spread(getattr(p, name))} for name in ("q", "k_cache", "v_cache"))
    for changed in (heads_first, together):
        assert_same_bits(solve(p._replace(**changed)), expected)
    for changed in apart:  # a kernel for any alignment takes these
        check_decode(solve, p._replace(**changed))
