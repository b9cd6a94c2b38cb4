"""fastattn.scaled_dot_product_attention against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.testing import random_like

pytestmark = pytest.mark.emulated


def shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None, **options):
    return pytest.param(q, k, v or k, options, id=f"{q}-{k}-{'-'.join(options)}".replace(" ", ""))


@pytest.mark.parametrize(
    ("q", "k", "v", "options"),
    [
        shapes((2, 3, 5, 8), (2, 3, 7, 8)),
        shapes((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 12)),
        shapes((5, 8), (7, 8)),
        shapes((3, 5, 8), (3, 7, 8)),
        shapes((2, 2, 3, 5, 8), (2, 2, 3, 7, 8)),
        shapes((2, 3, 5, 8), (1, 3, 7, 8)),
        shapes((2, 3, 5, 8), (7, 8)),
        shapes((2, 1, 5, 8), (2, 3, 7, 8)),
        shapes((2, 6, 5, 8), (2, 3, 7, 8), enable_gqa=True),
        shapes((6, 5, 8), (2, 7, 8), enable_gqa=True),
        shapes((0, 3, 5, 8), (0, 3, 7, 8)),
        shapes((2, 3, 5, 8), (2, 3, 7, 8), scale=0.3),
        shapes((2, 3, 5, 8), (2, 3, 5, 8), is_causal=True),
        shapes((2, 3, 5, 8), (2, 3, 7, 8), is_causal=True),
        shapes((2, 3, 9, 8), (2, 3, 7, 8), is_causal=True),
    ],
)
def test_scaled_dot_product_attention_is_torchs(backend, q, k, v, options, monkeypatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", backend)
    inputs = [torch.randn(s, requires_grad=True) for s in (q, k, v)]
    assert_same_as_torch(inputs, options)


@pytest.mark.parametrize(
    ("q", "mask"),
    [
        ((2, 3, 5, 8), (5, 7)),
        ((2, 3, 5, 8), (1, 7)),
        ((2, 3, 5, 8), (2, 1, 1, 7)),
        ((2, 3, 5, 8), (1, 3, 5, 1)),
        ((3, 5, 8), (3, 5, 7)),
        ((5, 8), (5, 7)),
        ((2, 2, 3, 5, 8), (2, 3, 5, 7)),
        ((2, 2, 3, 5, 8), (2, 1, 1, 5, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_mask_is_torchs(
    backend: str,
    q: tuple[int, ...],
    mask: tuple[int, ...],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", backend)
    k = (*q[:-2], 7, 8)
    inputs = [torch.randn(s, requires_grad=True) for s in (q, k, k)]
    attn_mask = torch.randn(mask) > -0.5 if kind == "bool" else torch.randn(mask)
    if kind == "float":
        attn_mask.requires_grad_()
    assert_same_as_torch(inputs, {"attn_mask": attn_mask})


def assert_same_as_torch(inputs: list[Tensor], options: dict) -> None:
    mask = options.get("attn_mask")
    leaves = inputs + ([mask] if mask is not None and mask.requires_grad else [])
    results = []
    for function in (fastattn.scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = function(*inputs, **options)
        results.append((out, *torch.autograd.grad(out, leaves, random_like(out, 1))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_scaled_dot_product_attention_refuses_what_torch_refuses() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    with pytest.raises(ValueError, match="enable_gqa"):
        fastattn.scaled_dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match="is_causal and attn_mask"):
        fastattn.scaled_dot_product_attention(q, q, q, torch.ones(5, 5), is_causal=True)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        fastattn.scaled_dot_product_attention(q[0, 0, 0], q, q)


def test_a_vector_of_queries_meets_several_heads_of_keys(backend, monkeypatch) -> None:
    """2-D beside 3-D: the heads are broadcast too."""
    monkeypatch.setenv("FASTATTN_BACKEND", backend)
    q, k = torch.randn(5, 8, requires_grad=True), torch.randn(3, 7, 8, requires_grad=True)
    assert_same_as_torch([q, k, k], {})


def test_autocast_narrows_each_input() -> None:
    """Also where only some are wide."""
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.scaled_dot_product_attention(q, k, k)
    assert torch.equal(out, fastattn.scaled_dot_product_attention(q.bfloat16(), k, k))
    with pytest.raises(TypeError, match="key has dtype"):
        fastattn.scaled_dot_product_attention(q, k, k)
