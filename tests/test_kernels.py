"""The Triton kernels in the interpreter: their helpers, and what they read and write."""

from __future__ import annotations

import functools
from collections.abc import Callable

import hidden_values
import public
import pytest
import torch
from torch import Tensor

from fastattn import backend_triton, philox, reference
from fastattn.testing import (
    CASES,
    CE_CASES,
    DECODE_CASES,
    Case,
    CrossEntropyCase,
    DecodeCase,
    attention_results,
    cross_entropy_results,
    decode_results,
    make_cross_entropy_problem,
    make_decode_problem,
    make_problem,
    to_float64,
)

if (reason := backend_triton.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)
if not backend_triton.interpreted():
    pytest.skip("these tests are of the interpreter", allow_module_level=True)

import interpreter_checks
import triton
import triton.language as tl
from fastattn.kernels import primitives

# --- the interpreter, mended ----------------------------------------------------------------------


@triton.jit
def product_kernel(a, b, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    product = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(out + at, product.to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", public.KERNEL_DTYPES, ids=public.name_of)
def test_products_and_rounding_are_right(dtype: torch.dtype) -> None:
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(16, 16, dtype=dtype)
    product_kernel[(1,)](a, b, out, SIZE=16)
    expected = (a.double() @ b.double()).to(dtype)
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@triton.jit
def round_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


def test_bfloat16_is_rounded_to_nearest_even_and_back() -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3.4e38, 1 + 2**-8])
    x = torch.cat((special, torch.randn(1016)))
    rounded, back = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    round_kernel[(1,)](x, rounded, SIZE=1024)
    round_kernel[(1,)](rounded, back, SIZE=1024)
    assert torch.equal(rounded.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
    assert torch.equal(back.nan_to_num(7.0), rounded.float().nan_to_num(7.0))


# --- primitives -----------------------------------------------------------------------------------


@triton.jit
def blocks_kernel(out, first, last, diagonal, seqlen, left, right, BLOCK: tl.constexpr):
    blocks = primitives.blocks_seen(first, last, diagonal, seqlen, left, right, BLOCK)
    tl.store(out, blocks.begin)
    tl.store(out + 1, blocks.inner_begin)
    tl.store(out + 2, blocks.inner_end)
    tl.store(out + 3, blocks.end)


@pytest.mark.parametrize("left", [None, 0, 3, 9])
@pytest.mark.parametrize("right", [None, 0, 3, 9])
def test_blocks_cover_what_is_seen_and_check_what_is_not(left: int | None, right: int | None):
    """Keys of no block are hidden from all queries, keys of inner blocks from none."""
    block = 4
    for seqlen_q, seqlen in ((1, 1), (7, 7), (3, 17), (17, 3), (8, 16)):
        diagonal, out = seqlen - seqlen_q, torch.zeros(4, dtype=torch.int32)
        for first in range(0, seqlen_q, block):
            last = min(first + block, seqlen_q) - 1
            blocks_kernel[(1,)](out, first, last, diagonal, seqlen, left, right, BLOCK=block)
            begin, inner_begin, inner_end, end = out.tolist()
            assert begin <= inner_begin <= inner_end <= end
            assert begin % block == 0 and (inner_begin % block == 0 or inner_begin == end)
            assert (inner_end - inner_begin) % block == 0
            for j in range(seqlen):
                seen = [
                    (left is None or j >= i + diagonal - left)
                    and (right is None or j <= i + diagonal + right)
                    for i in range(first, last + 1)
                ]
                assert begin <= j < end or not any(seen), (seqlen_q, seqlen, first, j)
                assert not inner_begin <= j < inner_end or all(seen), (seqlen_q, seqlen, first, j)
            assert inner_end <= max(seqlen, inner_begin)


@triton.jit
def kept_kernel(out, seed, threshold, batch, head, first, first_key, BLOCK: tl.constexpr):
    mods = primitives.ScoreMods(None, None, None, None, None, None, None, seed, threshold, None)
    place = primitives.Place(batch, head, 0, 0, 0, 0)
    rows = tl.arange(0, BLOCK)
    keep = primitives.kept(mods, place, first + rows, first_key, BLOCK)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], keep)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9, 1.0])
def test_dropout_is_philox_bit_for_bit(dropout_p: float) -> None:
    seed, block = torch.tensor(-0x1234_5678_9ABC_DEF0), 16
    expected = philox.keep_mask(seed, dropout_p, 3, 5, 64, 96)
    for batch, head, first, first_key in ((0, 0, 0, 0), (2, 4, 48, 80), (1, 3, 32, 16)):
        out = torch.zeros(block, block, dtype=torch.bool)
        threshold = philox.keep_threshold(dropout_p)
        kept_kernel[(1,)](out, seed, threshold, batch, head, first, first_key, BLOCK=block)
        tile = expected[batch, head, first : first + block, first_key : first_key + block]
        assert torch.equal(out, tile)


@triton.jit
def tanh_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, primitives.tanh(tl.load(x + i)))


def test_tanh_is_within_a_few_ulps_and_never_beyond_1() -> None:
    x = torch.cat((torch.linspace(-12, 12, 8189), torch.tensor([torch.inf, -torch.inf, torch.nan])))
    out = torch.empty_like(x)
    tanh_kernel[(1,)](x, out, SIZE=8192)
    torch.testing.assert_close(out, x.double().tanh().float(), rtol=4e-7, atol=0, equal_nan=True)
    assert (out[:-1].abs() <= 1).all()


# --- what kernels touch ---------------------------------------------------------------------------


def named(cases: tuple, *names: str) -> list:
    return [case for case in cases if case.name in names]


Run = Callable[[], object]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run, int], None]:
    def check(run: Run, launches: int) -> None:
        with interpreter_checks.watched(monkeypatch) as watch:
            run()
        assert watch.launches == launches

    return check


@pytest.mark.parametrize(
    "case",
    named(CASES, "dim-33", "mask-rows", "bias-shared", "strides-padded", "packed-everything"),
    ids=str,
)
def test_attention_stays_in_bounds_and_races_for_nothing(case: Case, check) -> None:
    p = make_problem(case, torch.float16)
    check(lambda: attention_results(public.attention_on("triton"), p), 3)


@pytest.mark.parametrize(
    "case", named(DECODE_CASES, "splits-5", "leftpad-append", "paged-everything"), ids=str
)
def test_decoding_stays_in_bounds_and_races_for_nothing(case: DecodeCase, check) -> None:
    p = make_decode_problem(case, torch.bfloat16)
    check(lambda: decode_results(functools.partial(public.decode, backend="triton"), p), 2)


@pytest.mark.parametrize("case", named(CE_CASES, "padded", "everything", "vocab-1"), ids=str)
def test_losses_stay_in_bounds_and_race_for_nothing(case: CrossEntropyCase, check) -> None:
    p = make_cross_entropy_problem(case, torch.bfloat16)
    function = functools.partial(public.cross_entropy, backend="triton")
    check(lambda: cross_entropy_results(function, p), 2)


# --- values that are no numbers -------------------------------------------------------------------


@pytest.mark.parametrize("value", hidden_values.VALUES, ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("case, row", hidden_values.CASES, ids=str)
def test_hidden_values_reach_nobody(case: Case, row: int, where: str, value: float) -> None:
    dtype = public.KERNEL_DTYPES[(row + "qkv".index(where)) % 3]
    hidden_values.check_attention(case, row, where, value, dtype, "triton")


@pytest.mark.parametrize("value", hidden_values.VALUES, ids=str)
@pytest.mark.parametrize("where", ["k_cache", "v_cache"])
@pytest.mark.parametrize(
    "case, position, seen",
    [
        (DecodeCase("causal", (100, 90), 5, capacity=110, window=(-1, 0)), 98, 2),
        (
            DecodeCase(
                "splits", (100, 90), 5, capacity=110, window=(-1, 0), num_splits=2, sinks=True
            ),
            98,
            2,
        ),
        (
            DecodeCase(
                "paged", (100, 90), 3, capacity=112, page_size=16, window=(20, 0), alibi="h"
            ),
            77,
            1,
        ),
        (DecodeCase("window", (100, 90), 1, capacity=110, window=(20, 0)), 77, 0),
    ],
    ids=str,
)
def test_hidden_values_reach_nobody_in_decoding(
    case: DecodeCase, position: int, seen: int, where: str, value: float
) -> None:
    """Those of a key of the first sequence, which `seen` of its queries see."""
    p = make_decode_problem(case, torch.float16)
    bad = getattr(p, where).clone()
    row, at = 0, position
    if p.block_table is not None:
        row, at = int(p.block_table[0, position // 16]), position % 16
    bad[row, at, 0, 3] = value
    p = p._replace(**{where: bad})
    out, lse = public.decode(p, backend="triton")
    out64, lse64 = reference.attention_decode(to_float64(p))
    for ours, exact in ((out, out64), (lse, lse64)):
        assert torch.equal(ours.isnan(), exact.isnan())
        assert torch.equal(ours.isinf(), exact.isinf())
    there = out64.isfinite()
    assert (~there[0]).any(-1).any(-1).sum() == seen
    torch.testing.assert_close(out.double()[there], out64[there], rtol=2e-3, atol=2e-3)


@triton.jit
def faulty_kernel(x, SIZE: tl.constexpr, RACE: tl.constexpr):
    i = tl.arange(0, SIZE)
    if RACE:
        tl.store(x + i, i.to(tl.float32))
    else:
        tl.store(x + tl.program_id(0) * SIZE + i + 1, i.to(tl.float32))


@pytest.mark.parametrize(("race", "message"), [(True, "race"), (False, "outside all arguments")])
def test_the_watch_sees_planted_faults(race: bool, message: str, check) -> None:
    x: Tensor = torch.zeros(32)
    with pytest.raises(Exception, match=message):
        check(lambda: faulty_kernel[(2,)](x, SIZE=16, RACE=race), 1)
