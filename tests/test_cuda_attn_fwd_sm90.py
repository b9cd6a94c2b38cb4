"""Attention's forward on Hopper's kernel (wgmma, TMA, warps of two kinds), in the emulator.

tests/test_cuda_attn_fwd.py runs some cases under many orders of events; here are the whole grid,
which problems go to this kernel, and that each barrier, wait and fence in it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import emulated
import planted
import public
import pytest
import torch
from emulator.runtime import Library

import fastattn
from fastattn import backend_cuda, reference
from fastattn.problem import AttentionProblem
from fastattn.testing import (
    CASES,
    Case,
    assert_results_close,
    eager_attention,
    make_problem,
    to_float64,
)

pytestmark = pytest.mark.parametrize("emulated_arch", [90], indirect=True)
KERNEL = "attn_fwd_sm90.cuh"


@pytest.fixture
def emulator(emulated_arch: int) -> Iterator[Library]:
    library = Library(emulated.build())
    library.set_options("without=?")  # lists the places that are passed
    library.passed_places()
    yield library
    library.set_options()


def check(p: AttentionProblem) -> None:
    names = ("out", "lse")
    results = [public.attention(p, "cuda"), reference.attention(to_float64(p)), eager_attention(p)]
    assert_results_close(*(dict(zip(names, result, strict=True)) for result in results))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_the_contract(emulated_arch: int, case: Case, poisoned: None) -> None:
    p = make_problem(case, torch.bfloat16)
    if p.dropout_p > 0:
        p = p._replace(seed=public.drawn_seed())
    check(p)


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keys", [300, 301])
def test_values_beside_scores(emulated_arch: int, keys: int, bias_dtype: torch.dtype) -> None:
    """Of whole tiles, which are loaded in pairs where rows are aligned, and of the last one."""
    case = Case("", (1, 70, keys), (2, 1), 128, mask="11qk", bias="1hqk", dropout_p=0.2)
    p = make_problem(case, torch.bfloat16)
    assert p.bias is not None
    check(p._replace(bias=p.bias.to(bias_dtype), seed=public.drawn_seed()))


@pytest.mark.parametrize("head_dim", [1, 33, 90, 125, 130, 200, 256])
def test_head_dims_between_tiles(emulator: Library, head_dim: int, poisoned: None) -> None:
    """Columns that are not there are zeros, though memory behind them isn't."""
    q = torch.full((1, 150, 2, 256), torch.nan)
    q[..., :head_dim].normal_()
    q, k, v = (q.roll(i, 1).half()[..., :head_dim] for i in range(3))
    assert is_taken(emulator, AttentionProblem(q, k, v, window_right=0, scale=head_dim**-0.5))


def is_taken(emulator: Library, p: AttentionProblem) -> bool:
    """By what runs, which `explain` must have told before."""
    emulator.passed_places()
    check(p)
    taken = any(place.startswith(KERNEL) for place in emulator.passed_places())
    remark = backend_cuda.remark(p)
    assert remark is not None and taken == ("forward and backward by wgmma" in remark), remark
    return taken


def test_takes_what_tma_can_copy(emulator: Library) -> None:
    """And the kernel of sm_80 the rest."""
    q, k, v = torch.randn(3, 2, 40, 2, 64).half().unbind()
    assert is_taken(emulator, AttentionProblem(q, k, v))
    assert is_taken(emulator, AttentionProblem(*(t.transpose(1, 2) for t in (q, k, v))))  # strides
    assert is_taken(emulator, AttentionProblem(q[..., :61], k[..., :61], v[..., :3]))
    assert is_taken(emulator, AttentionProblem(q[:1, :, :1], k[:1, :, :1], v[:1, :, :1]))
    packed = torch.randn(3, 2 * 40, 2, 64).half().unbind()
    lengths = torch.tensor([0, 33, 80], dtype=torch.int32)
    sequences = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths}
    p = AttentionProblem(*packed, **sequences, max_seqlen_q=47, max_seqlen_k=47)
    assert is_taken(emulator, p)
    assert not is_taken(emulator, AttentionProblem(q[..., 1:], k[..., 1:], v[..., 1:]))  # alignment
    odd = torch.randn(2, 40, 2, 63).half()
    assert not is_taken(emulator, AttentionProblem(odd, odd, odd))
    one_head = k[:, :, :1].expand(-1, -1, 2, -1)
    assert not is_taken(emulator, AttentionProblem(q, one_head, one_head))
    assert not is_taken(emulator, AttentionProblem(q, k[:, :0], v[:, :0]))


def test_every_barrier_is_needed(emulator: Library) -> None:
    """By more tiles than there are SMs, and more blocks of keys than buffers."""
    q = torch.randn(1, 5, 9, 64).half()
    k, v = torch.randn(2, 1, 400, 1, 64).half().unbind()

    def run() -> list[torch.Tensor]:
        return [fastattn.attention(q, k, v, window=(380, 0), backend="cuda")]

    # Who waits for his turn does so for speed alone.
    assert planted.unnoticed(emulator, run) == [planted.place_of(KERNEL, "bar_sync(mine")]


def test_a_packed_neighbour_has_no_influence(emulator: Library) -> None:
    """Tiles hold the first keys of the next sequence too: not even NaN passes."""
    lengths = torch.tensor([0, 40, 100], dtype=torch.int32)
    q, k, v = torch.randn(3, 100, 2, 32).half().unbind()
    k[40:], v[40:] = torch.nan, torch.nan
    p = AttentionProblem(q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=60,
                         max_seqlen_k=60)  # fmt: skip
    out, lse = public.attention(p, "cuda")
    expected, expected_lse = reference.attention(to_float64(p))
    torch.testing.assert_close(out[:40].double(), expected[:40], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(lse[:, :40].double(), expected_lse[:, :40], rtol=1e-3, atol=1e-3)
    assert out[40:].isnan().all()


def test_explain_tells_the_kernel(emulated_arch: int) -> None:
    q = torch.zeros(1, 2, 1, 12).half()
    told = str(fastattn.explain(q, q, q, backend="cuda"))
    assert (
        "as TMA can't copy q: of strides (24, 12, 12, 1) one is no positive multiple of 8" in told
    )
