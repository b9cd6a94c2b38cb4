"""What FlopCounterMode counts for the package's operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import fastattn


def count(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def inputs(*shapes: tuple[int, ...], **options) -> list[Tensor]:
    return [torch.randn(s, requires_grad=True, **options) for s in shapes]


def test_attention_is_counted_as_torchs() -> None:
    """Where nothing is hidden; grouped heads and another D_v too."""
    q, k, v = inputs((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6))

    def ours() -> None:
        fastattn.attention(q, k, v).sum().backward()

    scores, values = 2 * 2 * 4 * 5 * 7 * 8, 2 * 2 * 4 * 5 * 7 * 6
    assert count(lambda: fastattn.attention(q, k, v)) == scores + values
    assert count(ours) == 4 * scores + 3 * values
    shapes = [torch.Size((2, 4, n, d)) for n, d in ((5, 8), (7, 8), (7, 6))]
    assert scores + values == sdpa_flop_count(*shapes)
    assert 3 * scores + 2 * values == sdpa_backward_flop_count(torch.Size((2, 4, 5, 6)), *shapes)


def test_only_visible_pairs_count() -> None:
    q, k = inputs((1, 4, 1, 8), (1, 6, 1, 8))
    assert count(lambda: fastattn.attention(q, k, k, causal=True)) == (3 + 4 + 5 + 6) * 32
    assert count(lambda: fastattn.attention(q, k, k, window=(0, 1))) == (2 + 2 + 2 + 1) * 32


def test_packed_lengths_are_read_where_they_can_be() -> None:
    (x,) = inputs((9, 2, 8))
    at = torch.tensor([0, 2, 9], dtype=torch.int32)
    longest = 2 * 7 * 7 * 2 * 32

    def packed() -> None:
        fastattn.attention_varlen(x, x, x, at, at, 7, 7)

    assert count(packed) == (2 * 2 + 7 * 7) * 2 * 32
    x, at = x.detach().to("meta"), at.to("meta")
    assert count(packed) == longest
    with FakeTensorMode():
        x, at = torch.randn(9, 2, 8), torch.zeros(3, dtype=torch.int32)
        assert count(packed) == longest


def test_decode() -> None:
    q, cache = torch.randn(2, 2, 4, 8), torch.randn(2, 16, 2, 8)
    lengths, starts = (torch.tensor(n, dtype=torch.int32) for n in ((5, 9), (1, 0)))

    def decode(**options) -> int:
        return count(
            lambda: fastattn.attention_decode(q, cache, cache, cache_seqlens=lengths, **options)
        )

    assert decode() == (5 + 9) * 2 * 4 * 32
    assert decode(causal=True, cache_leftpad=starts) == (3 + 4 + 8 + 9) * 4 * 32
    new = torch.randn(2, 1, 2, 8)
    assert decode(k=new, v=new) == (6 + 10) * 2 * 4 * 32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(reduction: str) -> None:
    x, w = inputs((6, 8), (33, 8))
    target, product = torch.arange(6), 2 * 6 * 8 * 33

    def loss() -> Tensor:
        return fastattn.linear_cross_entropy(x, w, target, reduction=reduction)

    with torch.no_grad():
        assert count(loss) == product
    recomputed = product if reduction == "none" else 0
    assert count(lambda: loss().sum().backward()) == 3 * product + recomputed
    w.requires_grad_(False)
    if reduction == "mean":
        assert count(lambda: loss().backward()) == 2 * product


def test_a_linear_layer_is_counted_as_torchs() -> None:
    x, weight, bias = inputs((6, 8), (33, 8), (33,))
    assert count(lambda: torch.ops.fastattn.linear(x, weight, bias, None)) == 2 * 6 * 8 * 33
    assert count(lambda: torch.nn.functional.linear(x, weight, bias)) == 2 * 6 * 8 * 33


def test_every_operator_with_products_has_a_formula() -> None:
    names = {
        name.removeprefix("fastattn::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastattn::")
    }
    without = {name for name in names if getattr(torch.ops.fastattn, name) not in flop_registry}
    assert all(name.startswith("cross_entropy") for name in without)
