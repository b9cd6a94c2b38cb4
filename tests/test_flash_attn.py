"""flash_attn's functions: their signatures, and their results against their written semantics."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import flash_attn as fa
from fastattn.testing import assert_results_close, random_like

OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,"
    " alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
PACKED = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {OPTIONS}",
    "flash_attn_kvpacked_func": f"q, kv, {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv, {OPTIONS}",
    "flash_attn_varlen_func": f"q, k, v, {PACKED}, {OPTIONS}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {PACKED}, {OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {OPTIONS}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
        " cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,"
        " causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,"
        " alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}


@pytest.fixture(autouse=True)
def on_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The face has no `backend` argument; the environment has."""
    if "backend" in request.fixturenames:
        monkeypatch.setenv("FASTATTN_BACKEND", request.getfixturevalue("backend"))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[name]})"


# --- the textbook ---------------------------------------------------------------------------------


def textbook(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, S_q, H_q, D), lse and weights, in float64, one query at a time."""
    q, k, v = (t.double() for t in (q, k, v))
    (batch, seqlen_q, heads, dim), (_, seqlen_k, heads_k, _) = q.shape, k.shape
    out = torch.zeros(batch, seqlen_q, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, seqlen_q), -torch.inf, dtype=torch.float64)
    weights = torch.zeros(batch, heads, seqlen_q, seqlen_k, dtype=torch.float64)
    left, right = window_size
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // heads_k)
            for i in range(seqlen_q):
                here = i + seqlen_k - seqlen_q  # aligned to the bottom right
                last = min(here if causal else seqlen_k, here + right if right >= 0 else seqlen_k)
                first = here - left if left >= 0 else 0
                seen = [j for j in range(seqlen_k) if first <= j <= last]
                if not seen:
                    continue
                s = k[b, seen, kv] @ q[b, i, h] * (dim**-0.5 if scale is None else scale)
                if softcap > 0:
                    s = softcap * torch.tanh(s / softcap)
                if alibi_slopes is not None:
                    slope = float(alibi_slopes.expand(batch, heads)[b, h])
                    s = s - slope * torch.tensor([abs(here - j) for j in seen])
                lse[b, h, i] = torch.logsumexp(s, 0)
                weights[b, h, i, seen] = torch.softmax(s, 0)
                out[b, i, h] = torch.softmax(s, 0) @ v[b, seen, kv]
    return out, lse, weights


CALLS = {
    "plain": {},
    "scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "window-causal": {"window_size": (4, 9), "causal": True},
    "window-negative": {"window_size": (-7, 1)},
    "softcap": {"softcap": 1.5, "softmax_scale": 1.0},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]},
    "alibi-batch": {"alibi_slopes": [[0.5, 0.3, 0.2, 0.1], [1.0, 0.4, 0.0, 0.2]], "causal": True},
}


def made(call: dict) -> dict:
    """The call with its lists as tensors, on the device that tests run on."""
    return {n: torch.tensor(x) if isinstance(x, list) else x for n, x in call.items()}


def textbook_options(call: dict) -> dict:
    options = dict(call)
    options["scale"] = options.pop("softmax_scale", None)
    left, right = options.get("window_size", (-1, -1))
    options["window_size"] = (left, min(right, 0) if options.get("causal") else right)
    return options


@pytest.mark.parametrize("lengths", [(7, 11), (11, 7), (1, 9)], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_func(backend: str, call: dict, lengths: tuple[int, int]) -> None:
    call = made(call)
    q = torch.randn(2, lengths[0], 4, 16)
    k, v = torch.randn(2, 2, lengths[1], 2, 16)
    expected, expected_lse, _ = textbook(q, k, v, **textbook_options(call))
    out, lse, s_dmask = fa.flash_attn_func(q, k, v, **call, return_attn_probs=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert s_dmask.shape == (0,)
    assert torch.equal(fa.flash_attn_func(q, k, v, **call), out)


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_packed_layouts_are_the_plain_one(backend: str, call: dict) -> None:
    call = made(call)
    qkv = torch.randn(2, 9, 3, 4, 16, requires_grad=True)
    out = fa.flash_attn_func(*qkv.unbind(2), **call)
    (expected,) = torch.autograd.grad(out.square().sum(), qkv)
    both = (
        fa.flash_attn_qkvpacked_func(qkv, **call),
        fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **call),
    )
    for again in both:
        assert torch.equal(again, out)
        (grad,) = torch.autograd.grad(again.square().sum(), qkv)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_varlen_is_each_sequence(backend: str, call: dict) -> None:
    call, lengths = made(call), ((5, 8), (0, 3), (9, 9))
    if (slopes := call.get("alibi_slopes")) is not None and slopes.dim() == 2:
        call = {**call, "alibi_slopes": torch.rand(3, 4)}
    offsets_q, offsets_k = (
        torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths, strict=True)
    )
    q, kv = torch.randn(14, 4, 16), torch.randn(20, 2, 2, 16)
    args = (offsets_q, offsets_k, 9, 9)
    out, lse, _ = fa.flash_attn_varlen_func(
        q, kv[:, 0], kv[:, 1], *args, **call, return_attn_probs=True
    )
    assert lse.shape == (4, 14)
    assert torch.equal(fa.flash_attn_varlen_kvpacked_func(q, kv, *args, **call), out)
    for b in range(3):
        rows, keys = (slice(*o[b : b + 2].tolist()) for o in (offsets_q, offsets_k))
        options = textbook_options(call)
        if slopes is not None and slopes.dim() == 2:
            options["alibi_slopes"] = call["alibi_slopes"][b]
        expected, expected_lse, _ = textbook(q[None, rows], *kv[None, keys].unbind(2), **options)
        torch.testing.assert_close(out[rows].double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, rows].double(), expected_lse[0], rtol=1e-5, atol=1e-5)


def test_varlen_qkvpacked_is_varlen(backend: str) -> None:
    qkv = torch.randn(12, 3, 2, 8, requires_grad=True)
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    out = fa.flash_attn_varlen_qkvpacked_func(qkv, offsets, 7, causal=True)
    plain = fa.flash_attn_varlen_func(*qkv.unbind(1), offsets, offsets, 7, 7, causal=True)
    assert torch.equal(out, plain)
    grads = [torch.autograd.grad(x.square().sum(), qkv)[0] for x in (out, plain)]
    assert torch.equal(*grads) and grads[0].is_contiguous()


@pytest.mark.parametrize("parts", [2, 3])
def test_packed_gradient_is_made_in_place(parts: int) -> None:
    """By the kernel, in one piece: nothing is gathered, padded or copied."""
    q, packed = torch.randn(2, 64, 4, 16), torch.randn(2, 64, parts, 4, 16, requires_grad=True)
    if parts == 2:
        out = fa.flash_attn_kvpacked_func(q, packed)
    else:
        out = fa.flash_attn_qkvpacked_func(packed)
    with torch.profiler.profile() as profile:
        out.backward(torch.ones_like(out))
    names = {event.name for event in profile.events()}
    assert "fastattn::attn_bwd_into" in names
    moving = ("stack", "cat", "copy_", "clone", "select_backward", "add", "add_", "zeros")
    assert not {f"aten::{name}" for name in moving} & names
    assert packed.grad is not None and packed.grad.is_contiguous()


def test_packed_layouts_of_any_strides() -> None:
    """Gradients come contiguous."""
    qkv = torch.randn(2, 4, 3, 9, 16).permute(0, 3, 2, 1, 4).requires_grad_()
    odd = torch.randn(2, 9, 3, 16, 4).mT.requires_grad_()  # no last stride of 1: it is copied
    for x in (qkv, odd):
        out = fa.flash_attn_qkvpacked_func(x, causal=True)
        plain = fa.flash_attn_func(*x.unbind(2), causal=True)
        assert torch.equal(out, plain)
        grads = [torch.autograd.grad(o.square().sum(), x)[0] for o in (out, plain)]
        torch.testing.assert_close(*grads)
    with torch.autocast("cpu", torch.bfloat16):
        out = fa.flash_attn_qkvpacked_func(qkv, causal=True)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
    assert grad.dtype == torch.float32 and grad.isfinite().all()


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["causal", "window", "alibi"])
def test_on_kernels_for_gpus(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of each layout."""
    call, packed = made(CALLS[name]), torch.randn(2, 9, 3, 4, 16).half()
    offsets = torch.tensor([0, 5, 18], dtype=torch.int32)

    def results(qkv: Tensor) -> dict[str, Tensor]:
        qkv = qkv.requires_grad_()
        flat = qkv.flatten(0, 1)
        outs = {
            "func": fa.flash_attn_func(*qkv.unbind(2), **call),
            "qkvpacked": fa.flash_attn_qkvpacked_func(qkv, **call),
            "kvpacked": fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **call),
            "varlen_qkvpacked": fa.flash_attn_varlen_qkvpacked_func(flat, offsets, 13, **call),
            "varlen_kvpacked": fa.flash_attn_varlen_kvpacked_func(
                flat[:, 0], flat[:, 1:], offsets, offsets, 13, 13, **call
            ),
        }
        dout = random_like(outs["func"], 1)
        for name, out in list(outs.items()):
            (outs[f"d{name}"],) = torch.autograd.grad(
                out, qkv, dout.view_as(out), retain_graph=True
            )
        return {name: t.detach() for name, t in outs.items()}

    ours = results(packed)
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    assert_results_close(ours, results(packed.double()), results(packed))


def test_paged_varlen_is_the_gathered_one(backend: str) -> None:
    lengths, page_size = torch.tensor([5, 0, 9]), 4
    k, v = torch.randn(2, 8, page_size, 2, 16)
    table = torch.tensor([[6, 1, 0], [3, 3, 3], [2, 5, 7]], dtype=torch.int32)
    offsets_k = torch.tensor([0, 5, 5, 14], dtype=torch.int32)
    offsets_q = torch.tensor([0, 2, 3, 7], dtype=torch.int32)
    q = torch.randn(7, 4, 16)

    def gather(cache: Tensor) -> Tensor:
        rows = zip(table, lengths.tolist(), strict=True)
        return torch.cat([cache[pages.long()].flatten(0, 1)[:n] for pages, n in rows])

    options = {"causal": True, "return_attn_probs": True}
    args = (offsets_q, offsets_k, 4, 9)
    got = fa.flash_attn_varlen_func(q, k, v, *args, **options, block_table=table)
    expected = fa.flash_attn_varlen_func(q, gather(k), gather(v), *args, **options)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_s_dmask_is_the_dropout_that_out_has(backend: str, packed: bool) -> None:
    q, k, v = torch.randn(3, 2, 21, 2, 8)
    arguments: tuple = (q, k, v)
    function, offsets = fa.flash_attn_func, torch.tensor([0, 21, 42], dtype=torch.int32)
    if packed:
        function = fa.flash_attn_varlen_func
        arguments = (*(t.flatten(0, 1) for t in arguments), offsets, offsets, 21, 21)
    out, _, signed = function(*arguments, dropout_p=0.25, causal=True, return_attn_probs=True)
    _, _, undropped = textbook(q, k, v, causal=True)
    torch.testing.assert_close(signed.abs().double(), undropped, rtol=1e-5, atol=1e-6)
    dropped = (signed < 0).sum() / (undropped > 0).sum()
    assert abs(float(dropped) - 0.25) < 0.06
    again = torch.einsum("bhqk,bkhd->bqhd", signed.clamp(min=0) / 0.75, v)
    torch.testing.assert_close(out.view_as(again), again, rtol=1e-4, atol=1e-5)


def test_empty_rows(backend: str) -> None:
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 3, 2, 8)
    out, lse, _ = fa.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert not out[:, :2].any() and (lse[:, :, :2] == -torch.inf).all()


def test_deterministic_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        fa, "run", lambda p, deterministic, **_: asked.append(deterministic) or (p.q, 0)
    )
    q = torch.randn(1, 3, 2, 8)
    fa.flash_attn_func(q, q, q)
    fa.flash_attn_func(q, q, q, deterministic=True)
    assert asked == [None, True]


def test_wrong_packing_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(batch, sequence, 3, heads, head_dim\), got"):
        fa.flash_attn_qkvpacked_func(torch.randn(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match=r"\(tokens, 2, heads, head_dim\), got"):
        offsets = torch.tensor([0, 5], dtype=torch.int32)
        fa.flash_attn_varlen_kvpacked_func(
            torch.randn(5, 4, 8), torch.randn(5, 4, 8), offsets, offsets, 5, 5
        )


# --- the cache ------------------------------------------------------------------------------------


def rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (S, H, D) as complex numbers times cos + i·sin of its positions."""
    half = cos.shape[1]
    pairs = x[..., : 2 * half].double()
    pairs = pairs.unflatten(-1, (half, 2)) if interleaved else pairs.unflatten(-1, (2, half)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[positions, None]
    pairs = torch.view_as_real(turned)
    pairs = pairs.flatten(-2) if interleaved else pairs.mT.flatten(-2)
    return torch.cat((pairs, x[..., 2 * half :].double()), -1)


CACHE_CALLS = {
    "read": {},
    "append": {"append": True},
    "causal": {"append": True, "causal": True},
    "rotary": {"append": True, "causal": True, "rotary": True},
    "rotary-not-interleaved": {
        "append": True,
        "causal": True,
        "rotary": True,
        "rotary_interleaved": False,
    },
    "rotary-window": {"append": True, "rotary": True, "window_size": (5, 5)},
    "rotary-full": {"append": True, "rotary": True},  # all queries at one position
    "batch-idx": {"append": True, "causal": True, "cache_batch_idx": [4, 0, 2]},
    "leftpad": {"append": True, "causal": True, "cache_leftpad": [2, 0, 1]},
    "paged": {"append": True, "causal": True, "rotary": True, "paged": True},
    "splits": {"append": True, "causal": True, "num_splits": 3},
    "softcap-alibi": {"append": True, "softcap": 2.0, "alibi_slopes": [0.5, 0.3, 0.2, 0.1]},
    "int": {"cache_seqlens": 6},
    "none": {"cache_seqlens": None},
}


@pytest.mark.parametrize("call", CACHE_CALLS.values(), ids=list(CACHE_CALLS))
def test_with_kvcache(backend: str, call: dict) -> None:
    call = {"cache_seqlens": torch.tensor([7, 3, 10], dtype=torch.int32), **call}
    if "alibi_slopes" in call:
        call["alibi_slopes"] = torch.tensor(call["alibi_slopes"])
    new, rotary, paged = (call.pop(name, False) for name in ("append", "rotary", "paged"))
    batch, seqlen_q, capacity, page_size, dim = 3, 4, 16, 4, 16
    q = torch.randn(batch, seqlen_q, 4, dim)
    k_new, v_new = torch.randn(2, batch, seqlen_q, 2, dim)
    caches = torch.randn(2, 5, capacity, 2, dim)
    rows = call.get("cache_batch_idx", [0, 1, 2])
    place = torch.arange(5 * capacity).view(5, capacity)[rows]  # of each position, in memory
    if paged:
        pages = torch.randperm(20)[:12].view(batch, 4)
        call["block_table"] = pages.int()
        place = (pages[..., None] * page_size + torch.arange(page_size)).flatten(1)
        caches = caches.view(2, 20, page_size, 2, dim)
    for name in ("cache_batch_idx", "cache_leftpad"):
        if name in call:
            call[name] = torch.tensor(call[name], dtype=torch.int32)
    if rotary:
        angles = torch.rand(32, 3) * 6
        call |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    cos, sin = (call.get(f"rotary_{name}") for name in ("cos", "sin"))
    interleaved = call.get("rotary_interleaved", True)
    windowed = call.get("causal", False) or "window_size" in call

    given = call["cache_seqlens"]
    lengths = given.tolist() if isinstance(given, Tensor) else [given or capacity] * batch
    expected, expected_lse = [], []
    flat = [cache.clone().double().flatten(0, 1) for cache in caches]
    starts = call.get("cache_leftpad", torch.zeros(batch)).int().tolist()
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        queries, positions = q[b].double(), length + torch.arange(seqlen_q)
        keys = k_new[b].double()
        if rotary:
            keys = rotate(keys, positions, cos, sin, interleaved)
            at = positions if windowed else torch.full_like(positions, length)
            queries = rotate(queries, at, cos, sin, interleaved)
        if new:
            flat[0][place[b, positions]] = keys
            flat[1][place[b, positions]] = v_new[b].double()
            length += seqlen_q
        seen = place[b, start:length]
        names = ("causal", "window_size", "softcap", "alibi_slopes")
        options = {name: call[name] for name in names if name in call}
        out, lse, _ = textbook(queries[None], *(c[None, seen] for c in flat), **options)
        expected.append(out)
        expected_lse.append(lse)

    appended = (k_new, v_new) if new else ()
    out, lse = fa.flash_attn_with_kvcache(q, *caches, *appended, **call, return_softmax_lse=True)
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), torch.cat(expected_lse), rtol=1e-5, atol=1e-5)
    for cache, want in zip(caches, flat, strict=True):
        torch.testing.assert_close(cache.flatten(0, 1).double(), want, rtol=1e-5, atol=1e-6)


def test_with_kvcache_has_no_gradient() -> None:
    q = torch.randn(1, 1, 2, 8, requires_grad=True)
    cache = torch.randn(1, 4, 2, 8)
    assert not fa.flash_attn_with_kvcache(q, cache, cache).requires_grad


def test_appending_needs_a_place() -> None:
    q, cache = torch.randn(1, 1, 2, 8), torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="cache_seqlens"):
        fa.flash_attn_with_kvcache(q, cache, cache, q, q)


# --- machinery ------------------------------------------------------------------------------------


def test_compiles_whole() -> None:
    qkv = torch.randn(1, 9, 3, 2, 8, requires_grad=True)
    compiled = torch.compile(fa.flash_attn_qkvpacked_func, fullgraph=True, backend="aot_eager")
    for function in (compiled, fa.flash_attn_qkvpacked_func):
        out = function(qkv, causal=True)
        (grad,) = torch.autograd.grad(out.square().sum(), qkv)
        if function is compiled:
            first = out, grad
    torch.testing.assert_close(first, (out, grad))


def test_half_precision() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 16).bfloat16()
    out = fa.flash_attn_func(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fastattn.attention(q, k, v, causal=True))
    assert math.isclose(
        float(fa.flash_attn_func(q, k, v, softmax_scale=0.25, window_size=[-1, -1]).sum()),
        float(fastattn.attention(q, k, v).sum()),
    )
