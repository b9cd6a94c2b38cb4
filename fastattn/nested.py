"""Jagged nested tensors (B, j, H, D) as the packed sequences they are, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import validate


def pack(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Any, ...]:
    """`attention_varlen`'s arguments up to max_seqlen_k, sharing the nested tensors' memory.

    The longest lengths are what the nested tensors know, who may wait for the device to learn them,
    once; in compiled code, which can't wait, those that mask or bias are made for (the operator
    holds the real ones to them), or the numbers of all tokens.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not validate.tensor(name, t).is_nested or t.layout != torch.jagged:
            what = "a strided nested tensor" if t.is_nested else "not nested"
            raise ValueError(
                f"{name} is {what}; q, k and v must all be nested tensors of layout torch.jagged,"
                " or none"
            )
        if t.dim() != 4 or t._ragged_idx != 1:  # type: ignore[attr-defined]
            raise ValueError(
                f"{name} must be (batch, sequence, heads, head_dim), jagged in its sequences, got"
                f" {tuple(t.shape)}"
            )
        if t.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(f"{name} has holes between its sequences; take {name}.contiguous()")
    if k.shape[1] != v.shape[1]:
        raise ValueError(
            "k and v are jagged in different ways; build both with the same offsets tensor"
        )
    offsets = (t.offsets().to(torch.int32) for t in (q, k))  # type: ignore[attr-defined]
    values = tuple(t.values() for t in (q, k, v))
    if torch.compiler.is_compiling():
        bounds = (
            _bound(t.shape[0], dim, mask, bias) for t, dim in zip(values, (-2, -1), strict=False)
        )
        return *values, *offsets, *bounds
    longest = (t._get_max_seqlen() for t in (q, k))  # type: ignore[attr-defined]
    return *values, *offsets, *longest


def _bound(tokens: int, dim: int, *scores: Tensor | None) -> int:
    """The length that one of `scores`, which broadcast to (B, H_q, S_q, S_k), has along `dim`."""
    for t in scores:
        if isinstance(t, Tensor) and t.dim() >= -dim and t.shape[dim] != 1:
            return t.shape[dim]
    return tokens


def like(out: Tensor, q: Tensor) -> Tensor:
    """Packed (T_q, H_q, D_v) as a nested tensor, jagged as q is."""
    offsets = q.offsets()  # type: ignore[attr-defined]
    return torch.nested.nested_tensor_from_jagged(out, offsets)
