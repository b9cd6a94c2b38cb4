"""Every backend's decoding through the public function, against the contract."""

from __future__ import annotations

import functools
from typing import Any

import public
import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.problem import DecodeProblem
from fastattn.testing import DECODE_CASES, DecodeCase, check_decode, make_decode_problem

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize("dtype", public.KERNEL_DTYPES, ids=public.name_of)
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_keeps_the_contract(
    backend: str, case: DecodeCase, dtype: torch.dtype, poisoned: None
) -> None:
    """The caches hold NaN wherever they hold no key."""
    p = make_decode_problem(case, dtype)
    check_decode(functools.partial(public.decode, backend=backend), p)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("num_splits", [0, 3])
def test_splits_over_any_number_of_threads(backend: str, threads: int, num_splits: int) -> None:
    case = DecodeCase("", (900, 130, 0), capacity=900, head_dim=64, num_splits=num_splits)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        p = make_decode_problem(case, torch.bfloat16)
        check_decode(functools.partial(public.decode, backend=backend), p)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["", "paged"])
def test_step_by_step_is_attention_over_the_whole(
    backend: str, paged: bool, window: tuple[int, int]
) -> None:
    """40 tokens, in steps of 1, 7 and 32, each appended and attended to."""
    tokens = 40
    q = torch.randn(2, tokens, 4, 16)
    k, v = (torch.randn(2, tokens, 2, 16) for _ in range(2))
    causal = (window[0], 0)  # a step sees nothing of what is to come
    expected = fastattn.attention(q, k, v, window=causal, backend="reference")
    shape = (2 * 5, 8, 2, 16) if paged else (2, tokens, 2, 16)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    table = torch.randperm(10).view(2, 5).int() if paged else None
    outs, done = [], 0
    for step in (1, 7, 32):
        new = slice(done, done + step)
        outs.append(
            fastattn.attention_decode(
                q[:, new],
                k_cache,
                v_cache,
                cache_seqlens=torch.full((2,), done, dtype=torch.int32),
                block_table=table,
                k=k[:, new],
                v=v[:, new],
                window=causal,
                backend=backend,
            )
        )
        done += step
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-5, atol=1e-5)


def step(**changes: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of a valid step: B 2, S_q 3, S_new 3, 4 heads on 2, D 8, 16 positions."""
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 3, 4, 8),
        "k_cache": torch.randn(2, 16, 2, 8),
        "v_cache": torch.randn(2, 16, 2, 8),
        "cache_seqlens": torch.tensor([5, 13], dtype=torch.int32),
        "k": torch.randn(2, 3, 2, 8),
        "v": torch.randn(2, 3, 2, 8),
        "causal": True,
    }
    arguments |= changes
    positional = tuple(arguments.pop(name) for name in ("q", "k_cache", "v_cache"))
    return positional, arguments


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


TABLE = int32([0, 1], [1, 0])
ROTARY = torch.randn(16, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.randn(2, 4, 8)}, ValueError, "q must have 4 dimensions"),
        ({"q": torch.randn(2, 3, 3, 8)}, ValueError, "3 heads of q can't be grouped"),
        ({"q": torch.randn(2, 3, 4, 9)}, ValueError, "q and k_cache have different head dims"),
        ({"q": torch.randn(2, 3, 4, 8).half()}, TypeError, "k_cache has dtype"),
        ({"q": torch.randn(2, 3, 4, 8, device="meta")}, ValueError, "k_cache is on cpu"),
        ({"v_cache": torch.randn(2, 15, 2, 8)}, ValueError, "k_cache .* and v_cache"),
        ({"v_cache": torch.randn(2, 16, 2, 300)}, ValueError, "v_cache has head dim 300"),
        ({"k_cache": torch.randn(2, 16, 8, 2).mT}, ValueError, "k_cache is written in place"),
        ({"cache_seqlens": torch.tensor([5, 13])}, TypeError, "cache_seqlens must be int32"),
        ({"cache_seqlens": int32(5)}, ValueError, "cache_seqlens must have shape"),
        ({"cache_seqlens": int32(5, 14)}, ValueError, "cache_seqlens .* plus 3 new keys"),
        ({"cache_seqlens": int32(-1, 5)}, ValueError, "cache_seqlens"),
        ({"cache_seqlens": [5, 13]}, TypeError, "cache_seqlens must be a tensor"),
        ({"k": None}, ValueError, "k and v must be given together"),
        ({"k": torch.randn(2, 2, 2, 8)}, ValueError, "v must have shape"),
        ({"k": torch.randn(3, 2, 8)}, ValueError, "k must have 4 dimensions"),
        ({"v": torch.randn(2, 3, 4, 8)}, ValueError, "v must have shape"),
        ({"rotary_cos": ROTARY}, ValueError, "rotary_cos and rotary_sin must be given together"),
        (
            {"rotary_cos": torch.randn(16, 5), "rotary_sin": torch.randn(16, 5)},
            ValueError,
            "rotary_cos and rotary_sin must both be",
        ),
        (
            {"rotary_cos": ROTARY.half(), "rotary_sin": ROTARY.half()},
            TypeError,
            "rotary_cos must be torch.float32",
        ),
        (
            {"rotary_cos": ROTARY[:15], "rotary_sin": ROTARY[:15]},
            ValueError,
            "rotary_cos has 15 positions, but 16 are needed",
        ),
        ({"block_table": TABLE.long()}, TypeError, "block_table must be int32"),
        ({"block_table": TABLE[:1]}, ValueError, "block_table must have shape"),
        ({"block_table": TABLE + 1}, ValueError, "block_table must name pages in"),
        ({"block_table": TABLE - 1}, ValueError, "block_table must name pages in"),
        ({"block_table": TABLE[:, :0]}, ValueError, "cache_seqlens"),
        (
            {"block_table": TABLE, "cache_batch_idx": int32(0, 1)},
            ValueError,
            "cache_batch_idx and block_table",
        ),
        ({"cache_batch_idx": int32(0, 2)}, ValueError, r"cache_batch_idx must lie in \[0, 2\)"),
        ({"cache_batch_idx": int32(-1, 0)}, ValueError, "cache_batch_idx must lie in"),
        ({"cache_leftpad": int32(0, -1)}, ValueError, "cache_leftpad must lie between"),
        ({"cache_leftpad": int32(9, 0)}, ValueError, "cache_leftpad must lie between"),
        ({"window": (-2, 0)}, ValueError, "window left"),
        ({"softcap": -1.0}, ValueError, "softcap must be finite and ≥ 0"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"sinks": torch.randn(2)}, ValueError, "sinks must have shape"),
        ({"alibi_slopes": torch.randn(3, 4)}, ValueError, "alibi_slopes must have shape"),
        ({"num_splits": -1}, ValueError, "num_splits must be an integer"),
        ({"num_splits": 1.5}, ValueError, "num_splits must be an integer"),
        ({"backend": "cuda9"}, ValueError, "backend='cuda9' is no backend"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """Before anything is written to the cache."""
    positional, options = step(**changes)
    before = [t.clone() for t in positional[1:]]
    with pytest.raises(error, match=message):
        fastattn.attention_decode(*positional, **options)
    for cache, same in zip(positional[1:], before, strict=True):
        assert torch.equal(cache, same)


def test_the_valid_step_runs(backend: str) -> None:
    positional, options = step(backend=backend)
    out, lse = fastattn.attention_decode(*positional, **options, return_lse=True)
    assert out.shape == (2, 3, 4, 8) and lse.shape == (2, 4, 3) and out.isfinite().all()


def test_more_rows_than_sequences_need_an_index(backend: str) -> None:
    positional, options = step(k_cache=torch.randn(3, 16, 2, 8), v_cache=torch.randn(3, 16, 2, 8))
    with pytest.raises(ValueError, match="give cache_batch_idx"):
        fastattn.attention_decode(*positional, **options)
    options |= {"cache_batch_idx": int32(2, 0), "backend": backend}
    assert fastattn.attention_decode(*positional, **options).isfinite().all()


@pytest.mark.parametrize("name", ["q", "k_cache", "k", "sinks"])
def test_refuses_gradients(name: str) -> None:
    positional, options = step(sinks=torch.randn(4))
    named = dict(zip(("q", "k_cache", "v_cache"), positional, strict=True)) | options
    named[name].requires_grad_()
    with pytest.raises(RuntimeError, match="attention_decode has no backward"):
        fastattn.attention_decode(**named)
    with torch.no_grad():
        assert not fastattn.attention_decode(**named).requires_grad


def test_no_sequences(backend: str) -> None:
    positional, options = step()
    empty = tuple(t[:0] for t in positional)
    options |= {name: options[name][:0] for name in ("cache_seqlens", "k", "v")}
    out = fastattn.attention_decode(*empty, **options, backend=backend)
    assert out.shape == (0, 3, 4, 8)


def test_no_queries(backend: str) -> None:
    """Only appends."""
    positional, options = step()
    q, k_cache, v_cache = positional
    out = fastattn.attention_decode(q[:, :0], k_cache, v_cache, **options, backend=backend)
    assert out.shape == (2, 0, 4, 8)
    assert torch.equal(k_cache[1, 13:16], options["k"][1])
    assert torch.equal(v_cache[0, 5:8], options["v"][0])


def test_all_keys_left_of_the_padding(backend: str) -> None:
    positional, options = step(k=None, v=None, cache_leftpad=int32(5, 0))
    out, lse = fastattn.attention_decode(*positional, **options, return_lse=True, backend=backend)
    assert not out[0].any() and (lse[0] == -torch.inf).all() and out[1].abs().sum() > 0


def test_float64_runs_on_the_reference() -> None:
    positional, options = step()
    wide = tuple(t.double() for t in positional)
    options |= {name: options[name].double() for name in ("k", "v")}
    assert fastattn.attention_decode(*wide, **options).dtype == torch.float64


def test_strided_inputs(backend: str) -> None:
    """q, k, v as slices of one projection; caches as slices of one of both."""
    qkv, both = torch.randn(2, 3, 8, 8), torch.randn(2, 16, 2, 16)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    k_cache, v_cache = both.split(8, dim=3)
    positional, options = step(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    packed, plain = step(
        q=q.contiguous(), k=k.clone(), v=v.clone(), k_cache=k_cache.clone(), v_cache=v_cache.clone()
    )
    out = fastattn.attention_decode(*positional, **options, backend=backend)
    same = fastattn.attention_decode(*packed, **plain, backend=backend)
    assert torch.equal(out, same)
    assert torch.equal(k_cache, packed[1]) and torch.equal(v_cache, packed[2])


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["page", "position", "head"])
def test_cache_offsets_past_2_to_31_elements(backend: str, dim: int) -> None:
    """Of the pages, positions and heads. The emulator can't append so far: it maps what is written,
    byte for byte."""
    far, shape = 2**31 + 64, (2, 2, 2, 16)
    strides = [64, 32, 16]
    strides[dim] = far
    try:
        memory = torch.empty(far + 512, dtype=torch.float16)  # pages nobody touches take no memory
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    large = [memory[offset:].as_strided(shape, (*strides, 1)) for offset in (0, 128)]
    small = [torch.randn(shape, dtype=torch.float16) for _ in range(2)]
    for there, here in zip(large, small, strict=True):
        there.copy_(here)
    q, k, v = (torch.randn(1, 1, 2, 16, dtype=torch.float16) for _ in range(3))
    options = {
        "cache_seqlens": torch.tensor([3], dtype=torch.int32),
        "block_table": torch.tensor([[0, 1]], dtype=torch.int32),
        "backend": backend,
    }
    if backend != "cuda":
        options |= {"k": k, "v": v}
    out, same = (fastattn.attention_decode(q, *caches, **options) for caches in (large, small))
    assert torch.equal(out, same)
    assert all(torch.equal(*both) for both in zip(large, small, strict=True))


@pytest.mark.slow  # g++
def test_reads_the_caches_that_a_compiled_graph_has_written() -> None:
    """Views of one storage: what an operator is said to write, Inductor looks for elsewhere."""

    def step(q, k_cache, v_cache, k, v, position):
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache.index_copy_(2, position, new)
        lengths = (position + 1).int().expand(q.shape[0])
        k_cache, v_cache = (cache.transpose(1, 2) for cache in (k_cache, v_cache))
        return fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=lengths)

    q, k, v = torch.randn(2, 1, 8, 64), torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64)
    caches = torch.randn(2, 2, 2, 4096, 64)
    rest = (k, v, torch.tensor([5]))
    want = step(q, *caches.clone(), *rest)
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True)(q, *caches, *rest)
    torch.testing.assert_close(got, want)


def test_reference_and_kernels_take_the_same_problem() -> None:
    """The public function's fields are the problem's, in one order."""
    p = make_decode_problem(DECODE_CASES[-1], torch.float32)
    assert isinstance(p, DecodeProblem) and len(p) == len(DecodeProblem._fields)
    out, lse = public.decode(p, "reference")
    assert out.shape[:3] == p.q.shape[:3] and lse.dtype == torch.float32
