"""What both compiled libraries' kernels keep, the CPU's and, in the emulator, CUDA's.

The contract that every backend keeps is in test_losses.py and test_decode.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import cpu_isa
import emulated
import pytest
import torch
from torch import Tensor

from fastattn import library
from fastattn.compiled import Compiled
from fastattn.problem import CrossEntropyProblem
from fastattn.testing import DecodeCase, make_decode_problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAUSAL = (-1, 0)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Compiled:
    cpu = request.param == "cpu"
    if (reason := library.load_error() if cpu else emulated.why_not()) is not None:
        pytest.skip(reason)
    if not cpu:
        torch.ops.load_library(str(emulated.build()))
    return Compiled(lambda: torch.ops.fastattn_C if cpu else torch.ops.fastattn_emulated)


# --- cross-entropy --------------------------------------------------------------------------------


def problem(logits: list[list[float]], target: list[int], dtype: torch.dtype = torch.float32):
    return CrossEntropyProblem(torch.tensor(logits).to(dtype), torch.tensor(target))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_huge_offset_changes_nothing(kernels: Compiled, dtype: torch.dtype) -> None:
    huge = 2.0**24
    p = problem([[huge, huge], [-huge, -huge], [huge, -huge]], [1, 0, 0], dtype)
    loss, lse = kernels.cross_entropy_fwd(p, None, None)
    torch.testing.assert_close(loss, torch.tensor([math.log(2), math.log(2), 0.0]))
    torch.testing.assert_close(lse, torch.tensor([huge, -huge, huge]), rtol=1e-7, atol=0)
    expected = torch.tensor([[0.5, -0.5], [-0.5, 0.5], [0.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(kernels.cross_entropy_bwd(p, lse, torch.ones(3), None), expected)


@pytest.mark.parametrize("margin", (4.0, 6.0, 8.0, 10.0))
def test_confident_predictions_keep_the_targets_gradient(kernels: Compiled, margin: float) -> None:
    p = problem([[margin, 0.0, 0.0]], [0], torch.bfloat16)
    lse = kernels.cross_entropy_fwd(p, None, None)[1]
    # p_y − 1, of which nothing would be left if p_y were rounded to bf16 first
    expected = -2 / (math.exp(margin) + 2)
    dlogits = kernels.cross_entropy_bwd(p, lse, torch.ones(1), None)
    assert dlogits[0, 0].item() == pytest.approx(expected, rel=2**-8, abs=2**-23)


@pytest.mark.parametrize("vocab", (3, 2500))
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_nan_and_infinity_spread_in_their_row_alone(
    kernels: Compiled, vocab: int, label_smoothing: float
) -> None:
    logits = torch.randn(6, vocab)
    logits[1, 0] = math.nan
    logits[2, -1] = math.inf
    logits[3] = -math.inf
    logits[4, 1] = -math.inf  # a masked class is harmless unless it is smoothed
    p = CrossEntropyProblem(logits, torch.zeros(6).long(), label_smoothing=label_smoothing)
    loss, lse = kernels.cross_entropy_fwd(p, None, None)
    dlogits = kernels.cross_entropy_bwd(p, lse, torch.ones(6), None)
    good, masked = torch.tensor([0, 5]), 4
    assert loss[good].isfinite().all() and dlogits[good].isfinite().all()
    assert loss[1:4].isnan().all() and lse[1:4].isnan().all() and dlogits[1:4].isnan().all()
    assert lse[masked].isfinite() and dlogits[masked].isfinite().all()
    assert loss[masked].isinf() if label_smoothing else loss[masked].isfinite()


@pytest.mark.parametrize("fused", (False, True))
def test_ignored_rows_have_lse_but_no_gradient(kernels: Compiled, fused: bool) -> None:
    p = problem([[1.0, 2.0], [math.nan, 0.0], [0.0, 0.0]], [0, 0, 1])._replace(ignore_index=0)
    dlogits = torch.full_like(p.logits, math.nan)
    loss, lse = kernels.cross_entropy_fwd(p, torch.ones(3), dlogits if fused else None)
    if not fused:
        kernels.cross_entropy_bwd(p, lse, torch.ones(3), torch.zeros(3), dlogits)
    assert loss[:2].tolist() == [0.0, 0.0] and lse[1].isnan()
    assert lse[0].item() == pytest.approx(math.log(math.e + math.e**2))
    torch.testing.assert_close(dlogits, torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, -0.5]]))


def test_the_gradient_of_lse_reaches_ignored_rows(kernels: Compiled) -> None:
    p = problem([[1.0, 2.0, 3.0]], [-100])
    lse = kernels.cross_entropy_fwd(p, None, None)[1]
    dlogits = kernels.cross_entropy_bwd(p, lse, torch.ones(1), torch.tensor([2.0]))
    torch.testing.assert_close(dlogits, 2 * torch.softmax(p.logits, -1))


def test_one_row_may_stand_for_all(kernels: Compiled) -> None:
    p = CrossEntropyProblem(torch.randn(1, 70).expand(9, 70), torch.arange(9))
    loss, lse = kernels.cross_entropy_fwd(p, None, None)
    dlogits = kernels.cross_entropy_bwd(p, lse, torch.ones(9), None, torch.empty(9, 70))
    expected = torch.softmax(p.logits, -1) - torch.eye(9, 70)
    torch.testing.assert_close(dlogits, expected)
    torch.testing.assert_close(loss, lse - p.logits[0, :9])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_logits_of_any_size(kernels: Compiled, dtype: torch.dtype, label_smoothing: float) -> None:
    largest = torch.finfo(dtype).max
    logits = torch.tensor([[largest, -largest, 0.0], [-largest] * 3, [largest] * 3], dtype=dtype)
    p = CrossEntropyProblem(logits, torch.tensor([0, 1, 2]))
    loss, lse = kernels.cross_entropy_fwd(p, None, None)
    assert loss.tolist() == pytest.approx([0.0, math.log(3), math.log(3)])
    assert kernels.cross_entropy_bwd(p, lse, torch.ones(3), None).isfinite().all()


# --- decoding -------------------------------------------------------------------------------------

# Lengths on both sides of what kernels take at a time: 16 keys, 64, and the CPU's chunk of 512.
LENGTHS = DecodeCase("lengths", (15, 17, 63, 65, 129, 511, 513), capacity=600, heads=(6, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", (1, 16, 100, 256))
def test_pages_change_no_bit(kernels: Compiled, page_size: int, dtype: torch.dtype) -> None:
    p = make_decode_problem(LENGTHS, dtype)
    batch, capacity = p.k_cache.shape[:2]
    pages = -(-capacity // page_size)
    order = torch.randperm(batch * pages)

    def paged(cache: Tensor) -> Tensor:
        padded = torch.full((batch, pages * page_size, *cache.shape[2:]), math.nan, dtype=dtype)
        padded[:, :capacity] = cache
        in_order = padded.view(batch * pages, page_size, *cache.shape[2:])
        return torch.empty_like(in_order).index_copy_(0, order, in_order)

    block_table = order.view(batch, pages).int()
    k_cache, v_cache = paged(p.k_cache), paged(p.v_cache)
    in_pages = p._replace(k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    for x, y in zip(kernels.attn_decode(in_pages), kernels.attn_decode(p), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_keys_give_zero(kernels: Compiled, dtype: torch.dtype) -> None:
    case = DecodeCase("short", (2, 40), seqlen_q=4, heads=(6, 2), window=CAUSAL, leftpad=(0, 40))
    out, lse = kernels.attn_decode(make_decode_problem(case, dtype))
    for b, i in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)):
        assert (out[b, i] == 0).all() and (lse[b, :, i] == -math.inf).all()
    assert lse[0, :, 2:].isfinite().all()


@pytest.mark.parametrize("rotary_interleaved", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_its_own_places_alone(
    kernels: Compiled, dtype: torch.dtype, rotary_interleaved: bool
) -> None:
    case = DecodeCase("append", (3, 40), 1, 5, rotary_dim=12, page_size=7)
    p = make_decode_problem(replace(case, rotary_interleaved=rotary_interleaved), dtype)
    before = p.k_cache.clone(), p.v_cache.clone()
    kernels.attn_decode(p)
    positions = p.cache_seqlens[:, None] + torch.arange(5)
    place = p.block_table.gather(1, positions // 7).long(), positions % 7
    assert torch.equal(p.v_cache[place], p.v)
    assert torch.equal(p.k_cache[place][..., 12:], p.k[..., 12:])  # beyond the rotary dims
    assert not torch.equal(p.k_cache[place], p.k)
    p.k_cache[place], p.v_cache[place] = before[0][place], before[1][place]
    torch.testing.assert_close((p.k_cache, p.v_cache), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", (1, 2, 5, 8))
def test_what_a_query_does_not_see_does_not_reach_it(
    kernels: Compiled, group: int, dtype: torch.dtype
) -> None:
    case = DecodeCase("poisoned", (80,), 4, capacity=80, heads=(2 * group, 2), window=CAUSAL)
    p = make_decode_problem(case, dtype)
    clean = kernels.attn_decode(p)
    p.k_cache[:, 78:] = math.nan
    p.v_cache[:, 77:] = math.inf
    out, lse = kernels.attn_decode(p)
    # Rows that tensor cores spread NaN to are computed again, with weights in fp32.
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out[:, 0], clean[0][:, 0], rtol=eps, atol=eps)
    assert torch.equal(lse[:, :, 0], clean[1][:, :, 0])
    assert not out[:, 1:].isfinite().any() and lse[:, :, 2:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", (1, 8))
def test_what_a_window_has_left_behind_does_not_either(
    kernels: Compiled, group: int, dtype: torch.dtype
) -> None:
    case = DecodeCase("left", (80,), 4, capacity=80, heads=(2 * group, 2), window=(3, 0))
    p = make_decode_problem(case, dtype)
    clean = kernels.attn_decode(p)
    p.k_cache[:, 73] = math.nan  # which the first query sees alone
    p.v_cache[:, 73] = math.inf
    out, lse = kernels.attn_decode(p)
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out[:, 1:], clean[0][:, 1:], rtol=eps, atol=eps)
    assert torch.equal(lse[:, :, 1:], clean[1][:, :, 1:])
    assert not out[:, 0].isfinite().any() and lse[:, :, 0].isnan().all()


@pytest.mark.parametrize("isa", cpu_isa.others())
def test_every_instruction_set_passes_these_tests(isa: str) -> None:
    cpu_isa.run_file(__file__, isa, "cpu and not instruction_set")
