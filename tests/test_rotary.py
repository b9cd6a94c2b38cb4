"""Rotary embedding: against complex multiplication, and where it leaves things alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn.problem import DecodeProblem
from fastattn.rotary import apply_rotary, rotate_queries


def tables(positions: int, pairs: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    frequencies = 100.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.arange(positions)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_is_multiplication_by_a_unit_complex_number(rotary_dim: int, interleaved: bool) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    cos, sin = tables(5, rotary_dim // 2)
    got = apply_rotary(x, cos, sin, interleaved)
    half = rotary_dim // 2
    first, second = (slice(0, half), slice(half, rotary_dim))
    if interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    turned = torch.complex(x[..., first], x[..., second]) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(got[..., first], turned.real)
    torch.testing.assert_close(got[..., second], turned.imag)
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    q, k = (torch.randn(8, dtype=torch.float64).expand(1, 20, 1, 8) for _ in range(2))
    cos, sin = tables(20, 4)
    q, k = (apply_rotary(x, cos, sin, interleaved)[0, :, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_tables_of_each_sequence() -> None:
    x = torch.randn(2, 3, 1, 4)
    cos, sin = tables(10, 2, torch.float32)
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    got = apply_rotary(x, cos[positions], sin[positions])
    for b in range(2):
        same = apply_rotary(x[b : b + 1], cos[positions[b]], sin[positions[b]])
        assert torch.equal(got[b : b + 1], same)


def test_computes_in_float32_and_rounds_once() -> None:
    x = torch.randn(1, 5, 2, 8, dtype=torch.bfloat16)
    cos, sin = tables(5, 4, torch.float32)
    got = apply_rotary(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rotary(x.float(), cos, sin).bfloat16())


def test_is_differentiable() -> None:
    x = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, *tables(3, 2)), (x,))


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (4, -1)], ids=str)
def test_queries_of_a_decode_step(window: tuple[int, int]) -> None:
    """At cache_seqlens + i if windowed, else all at cache_seqlens."""
    q, cache = torch.randn(2, 3, 2, 8), torch.zeros(2, 16, 2, 8)
    cos, sin = tables(20, 4, torch.float32)
    lengths = torch.tensor([0, 9], dtype=torch.int32)
    p = DecodeProblem(
        q,
        cache,
        cache,
        lengths,
        rotary_cos=cos,
        rotary_sin=sin,
        window_left=window[0],
        window_right=window[1],
    )
    got = rotate_queries(p)
    for b, length in enumerate(lengths.tolist()):
        steps = torch.arange(3) if window != (-1, -1) else torch.zeros(3, dtype=torch.int64)
        same = apply_rotary(q[b : b + 1], cos[length + steps], sin[length + steps])
        assert torch.equal(got[b : b + 1], same)
    assert rotate_queries(p._replace(rotary_cos=None, rotary_sin=None)) is q
