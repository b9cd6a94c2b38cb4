"""The specification: attention in eager PyTorch, as docs/design.md states it; also the losses'.

Every backend is held to these functions. They take the plainest correct formula: scores exist as
whole matrices, nothing is tiled. fp16, bf16 and fp32 are computed in fp32, fp64 in fp64. Forward
functions (decoding apart) are differentiable by autograd any number of times; the `*_backward` are
the same gradients written out, from what a kernel keeps.

A key is *visible* to a query if mask and window let it. What is not visible has no influence, NaN
included: neither on the scores nor through 0 · NaN in a product. A row whose scores are all −inf,
or that has none, gives out 0, lse −inf and zero gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import philox
from .problem import AttentionProblem, DecodeProblem
from .reference_losses import (
    cross_entropy,
    cross_entropy_backward,
    linear_cross_entropy,
    without_autocast,
)
from .validate import accumulator_dtype

__all__ = [
    "AttentionGradients",
    "attention",
    "attention_backward",
    "attention_decode",
    "attention_entropy",
    "cross_entropy",
    "cross_entropy_backward",
    "decode_sequences",
    "diagonal_distance",
    "dropout_scale",
    "joined_rows",
    "linear_cross_entropy",
    "packed_sequences",
    "visible_keys",
]

# --- attention ------------------------------------------------------------------------------------


class AttentionGradients(NamedTuple):
    """Each of its input's shape and dtype; None where there is no bias, or no sinks."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    dsinks: Tensor | None


@without_autocast
def attention(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Exact attention with every feature of the contract.

    Returns out (B, S_q, H_q, D_v), contiguous, in q's dtype, and lse (B, H_q, S_q), in fp32 (fp64
    for fp64 inputs); packed, (T_q, H_q, D_v) and (H_q, T_q). lse is the natural log of the sum of
    exp(s), sinks included and before dropout. Tokens behind the last packed sequence give out 0 and
    lse −inf.
    """
    if not p.packed:
        return _attention_dense(p)
    outs, lses = [], []
    for sequence in packed_sequences(p):
        out, lse = _attention_dense(sequence.problem, sequence.number)
        outs.append(out[0])
        lses.append(lse[0])
    unused = p.q.shape[0] - sum(out.shape[0] for out in outs)
    outs.append(p.q.new_zeros(unused, p.q.shape[1], p.v.shape[2]))
    lses.append(p.q.new_full((p.q.shape[1], unused), -torch.inf, dtype=accumulator_dtype(p.q)))
    return torch.cat(outs), torch.cat(lses, dim=1)


@without_autocast
def attention_backward(
    p: AttentionProblem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None = None
) -> AttentionGradients:
    """The gradients of `attention`, from its inputs and outputs and the outputs' gradients.

    The weights are recomputed as exp(s − lse). With dP = dout Vᵀ and delta = rowsum(dout · out),
    ds = weights · (dP − delta + dlse): Dao et al., "FlashAttention", 2022, appendix B.4, and dlse
    enters as d lse / ds = weights. A sink is one more score, whose dP is 0.
    """
    core = _attention_backward_packed if p.packed else _attention_backward_dense
    dq, dk, dv, dscores, dsinks = core(p, out, lse, dout, dlse)
    return AttentionGradients(
        dq.to(p.q.dtype),
        dk.to(p.k.dtype),
        dv.to(p.v.dtype),
        None if p.bias is None else dscores.sum_to_size(p.bias.shape).to(p.bias.dtype),
        None if p.sinks is None else dsinks.to(p.sinks.dtype),
    )


@without_autocast
def attention_entropy(p: AttentionProblem, lse: Tensor) -> Tensor:
    """−Σ w · log w of the weights w = exp(s − lse), shaped as lse, in its dtype."""
    if p.packed:
        return joined_rows(p, lambda s: attention_entropy(s.problem, lse[None, :, s.rows]))
    q, k, _ = _heads_first(p)
    s, _ = _scores(p, q, k, visible_keys(p))
    gap = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None] - s
    weights = torch.exp(-gap)
    return torch.where(weights == 0, 0.0, weights * gap).sum(-1)


def _attention_dense(p: AttentionProblem, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_first(p)
    visible = visible_keys(p)
    s, _ = _scores(p, q, k, visible)

    # The maximum cancels out of the weights and of lse, so no gradient passes through it.
    row_max = s.detach().amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    sinks = None if p.sinks is None else p.sinks.to(s.dtype)[:, None]  # (H_q, 1)
    if sinks is not None:
        row_max = torch.maximum(row_max, sinks.detach())
    empty = row_max == -torch.inf
    row_max = row_max.masked_fill(empty, 0.0)  # −inf − (−inf) would be NaN
    weights = torch.exp(s - row_max[..., None])
    row_sum = weights.sum(-1)
    if sinks is not None:
        row_sum = row_sum + torch.exp(sinks - row_max)
    row_sum = row_sum.masked_fill(empty, 1.0)  # log and 1/x have no gradient at 0
    lse = (row_max + torch.log(row_sum)).masked_fill(empty, -torch.inf)  # (B, H_q, S_q)

    weights = weights / row_sum[..., None]
    if p.dropout_p > 0:
        weights = weights * dropout_scale(p, weights, first_batch)
    out = _product(weights, v, visible)  # (B, H_q, S_q, D_v)
    return out.transpose(1, 2).to(p.q.dtype).contiguous(), lse


class _DenseGradients(NamedTuple):
    dq: Tensor  # (B, S_q, H_q, D); packed (T_q, H_q, D)
    dk: Tensor  # (B, S_k, H_k, D)
    dv: Tensor  # (B, S_k, H_k, D_v)
    dscores: Tensor  # (B, H_q, S_q, S_k): the gradient of a bias of full shape
    dsinks: Tensor  # (H_q,); zeros without sinks


def _attention_backward_dense(
    p: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    first_batch: int = 0,
) -> _DenseGradients:
    q, k, v = _heads_first(p)
    out, dout = (x.to(q.dtype).transpose(1, 2) for x in (out, dout))
    visible = visible_keys(p)
    hidden = None if visible is None else ~visible
    s, slope = _scores(p, q, k, visible)

    def clear_hidden(x: Tensor) -> Tensor:
        return x if hidden is None else x.masked_fill(hidden, 0.0)

    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # all scores −inf: exp(s − 0) is 0 as it should
    weights = clear_hidden(torch.exp(s - lse[..., None]))
    dweights = _dot(dout, v, visible)
    row_term = -(dout * out).sum(-1) + (0.0 if dlse is None else dlse)  # dlse − delta
    dropped = weights
    if p.dropout_p > 0:
        factor = dropout_scale(p, weights, first_batch)
        dropped, dweights = weights * factor, dweights * factor
    ds = clear_hidden(weights * (dweights + row_term[..., None]))
    dqk = clear_hidden(p.scale * slope * ds)  # the gradient of q · k

    transposed = None if visible is None else visible.mT
    dq = _product(dqk, k, visible)
    dk = _product(dqk.mT, q, transposed)
    dv = _product(dropped.mT, dout, transposed)
    dsinks = row_term.new_zeros(row_term.shape[1])
    if p.sinks is not None:
        dsinks = (torch.exp(p.sinks.to(s.dtype)[:, None] - lse) * row_term).sum((0, 2))

    groups = p.k.shape[2], p.q.shape[2] // p.k.shape[2]
    dk, dv = (x.unflatten(1, groups).sum(2) for x in (dk, dv))
    return _DenseGradients(dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), ds, dsinks)


def _attention_backward_packed(
    p: AttentionProblem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> _DenseGradients:
    dtype, heads = accumulator_dtype(p.q), p.q.shape[1]
    batch = p.cu_seqlens_q.shape[0] - 1  # type: ignore[union-attr]
    scores_shape = (batch, heads, p.max_seqlen_q, p.max_seqlen_k) if p.bias is not None else (0,)
    total = _DenseGradients(
        dq=p.q.new_zeros(p.q.shape, dtype=dtype),
        dk=p.k.new_zeros(p.k.shape, dtype=dtype),
        dv=p.v.new_zeros(p.v.shape, dtype=dtype),
        dscores=p.q.new_zeros(scores_shape, dtype=dtype),
        dsinks=p.q.new_zeros(heads, dtype=dtype),
    )
    for number, rows, keys, sequence in packed_sequences(p):
        row_dlse = None if dlse is None else dlse[None, :, rows]
        dq, dk, dv, dscores, dsinks = _attention_backward_dense(
            sequence, out[None, rows], lse[None, :, rows], dout[None, rows], row_dlse, number
        )
        total.dq[rows], total.dk[keys], total.dv[keys] = dq[0], dk[0], dv[0]
        if p.bias is not None:
            total.dscores[number, :, : dscores.shape[2], : dscores.shape[3]] = dscores[0]
        total.dsinks.add_(dsinks)
    return total


class PackedSequence(NamedTuple):
    number: int  # in the batch; the Philox counter's b
    rows: slice  # of q
    keys: slice  # of k and v
    problem: AttentionProblem  # dense, batch 1


def packed_sequences(p: AttentionProblem) -> Iterator[PackedSequence]:
    """A packed problem's sequences; its mask and bias are over the longest ones, cut to each."""
    assert p.cu_seqlens_q is not None and p.cu_seqlens_k is not None
    offsets_q, offsets_k = p.cu_seqlens_q.tolist(), p.cu_seqlens_k.tolist()
    batch, dtype = len(offsets_q) - 1, accumulator_dtype(p.q)
    # Widened here, the gradients that all sequences share are summed before they are rounded.
    bias, sinks = (None if x is None else x.to(dtype) for x in (p.bias, p.sinks))
    for b in range(batch):
        rows, keys = slice(*offsets_q[b : b + 2]), slice(*offsets_k[b : b + 2])
        q, k, v = p.q[None, rows], p.k[None, keys], p.v[None, keys]

        def cut(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x.expand(batch, -1, p.max_seqlen_q, p.max_seqlen_k)
            return x[b : b + 1, :, : q.shape[1], : k.shape[1]]  # noqa: B023

        slopes = p.alibi_slopes
        problem = p._replace(
            q=q,
            k=k,
            v=v,
            mask=cut(p.mask),
            bias=cut(bias),
            sinks=sinks,
            alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        yield PackedSequence(b, rows, keys, problem)


def joined_rows(p: AttentionProblem, compute: Callable[[PackedSequence], Tensor]) -> Tensor:
    """What `compute` makes of each sequence, (1, H_q, S_q), as (H_q, T_q); 0 behind the last."""
    parts = [compute(sequence)[0] for sequence in packed_sequences(p)]
    unused = p.q.shape[0] - sum(part.shape[1] for part in parts)
    parts.append(p.q.new_zeros(p.q.shape[1], unused, dtype=accumulator_dtype(p.q)))
    return torch.cat(parts, dim=1)


def _heads_first(p: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (B, H_q, S, D) in the accumulator dtype, each KV head repeated for its group."""
    dtype, group_size = accumulator_dtype(p.q), p.q.shape[2] // p.k.shape[2]
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (p.q, p.k, p.v))
    if group_size > 1:
        k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    return q, k, v


def diagonal_distance(p: AttentionProblem) -> Tensor:
    """j − (i + S_k − S_q), (S_q, S_k): 0 on the diagonal that ends in the bottom right corner."""
    seqlen_q, seqlen_k = p.q.shape[1], p.k.shape[1]
    i = torch.arange(seqlen_q, device=p.q.device)[:, None]
    j = torch.arange(seqlen_k, device=p.q.device)
    return j - (i + seqlen_k - seqlen_q)


def visible_keys(p: AttentionProblem, distance: Tensor | None = None) -> Tensor | None:
    """Bool, broadcastable to (B, H_q, S_q, S_k); None if every key is visible to every query.

    `distance` is diagonal_distance(p), or that of the block of rows and keys that p stands for.
    """
    visible = p.mask
    if p.window_left < 0 and p.window_right < 0:
        return visible
    distance = diagonal_distance(p) if distance is None else distance
    sides = []
    if p.window_left >= 0:
        sides.append(distance >= -p.window_left)
    if p.window_right >= 0:
        sides.append(distance <= p.window_right)
    for inside in sides:
        visible = inside if visible is None else visible & inside
    return visible


def _scores(
    p: AttentionProblem, q: Tensor, k: Tensor, visible: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """s (B, H_q, S_q, S_k), −inf where not visible, and its derivative by scale · q · k."""
    s, slope = shaped_scores(p, p.scale * _dot(q, k, visible))
    return s if visible is None else s.masked_fill(~visible, -torch.inf), slope


def shaped_scores(
    p: AttentionProblem, s: Tensor, distance: Tensor | None = None
) -> tuple[Tensor, Tensor | float]:
    """s = scale · q · k with p's softcap, bias and ALiBi, and its derivative by what it was.

    `distance` as in `visible_keys`.
    """
    slope: Tensor | float = 1.0
    if p.softcap > 0:
        t = torch.tanh(s / p.softcap)
        s, slope = p.softcap * t, 1 - t * t
    if p.bias is not None:
        s = s + p.bias.to(s.dtype)
    if p.alibi_slopes is not None:
        distance = diagonal_distance(p) if distance is None else distance
        s = s - p.alibi_slopes.to(s.dtype)[..., None, None] * distance.abs()
    return s, slope


def dropout_scale(p: AttentionProblem, weights: Tensor, first_batch: int) -> Tensor:
    """The factor of each weight: 0 where dropped, 1 / (1 − p) where kept."""
    assert p.seed is not None
    batch, heads, seqlen_q, seqlen_k = weights.shape
    keep = philox.keep_mask(
        p.seed, p.dropout_p, batch, heads, seqlen_q, seqlen_k, weights.device, first_batch
    )
    return keep.to(weights.dtype) * (1 / (1 - p.dropout_p) if p.dropout_p < 1 else 0.0)


def _dot(a: Tensor, b: Tensor, visible: Tensor | None) -> Tensor:
    """a · b over the last axis: (…, M, D) and (…, N, D) give (…, M, N); valid where visible.

    A NaN in b must not come back through autograd to an `a` that does not see it, as it would from
    a plain product, where 0 · NaN is NaN. So what is hidden is cleared first, one b at a time.
    """
    if visible is None or _all_finite(b):
        return a @ b.mT
    visible = visible.expand(*a.shape[:-1], b.shape[-2])
    columns = range(b.shape[-2])
    return torch.stack(
        [(a * b[..., None, n, :].where(visible[..., n, None], 0.0)).sum(-1) for n in columns], -1
    )


def _product(weights: Tensor, x: Tensor, visible: Tensor | None) -> Tensor:
    """weights · x over the visible pairs: (…, M, N) and (…, N, D) give (…, M, D)."""
    if visible is None or _all_finite(x):
        return weights @ x
    visible = visible.expand(weights.shape)
    total = weights.new_zeros(*weights.shape[:-1], x.shape[-1])
    for n in range(x.shape[-2]):
        total = total + weights[..., n, None] * x[..., None, n, :].where(visible[..., n, None], 0.0)
    return total


def _all_finite(x: Tensor) -> bool:
    # A traced graph cannot branch on values: compiled, the reference lets a hidden NaN through.
    return torch.compiler.is_compiling() or bool(x.isfinite().all())


# --- decoding -------------------------------------------------------------------------------------


@torch.no_grad()
@without_autocast
def attention_decode(p: DecodeProblem) -> tuple[Tensor, Tensor]:
    """Attention of a few queries over a KV cache, after rotary embedding and append: no gradients.

    New keys, rotated at positions cache_seqlens + i, and values are written to the cache in place,
    at those positions. Queries are rotated at cache_seqlens + i if there is a window (causal is
    one), else all at cache_seqlens; what is rotated is rounded to its dtype. Then each sequence
    attends to the keys of positions [leftpad, cache_seqlens + S_new), the last query aligned with
    the last key. Returns out (B, S_q, H_q, D_v) in q's dtype and lse (B, H_q, S_q).
    Semantics of flash_attn_with_kvcache in the flash_attn package.
    """
    batch, seqlen_q, heads, _ = p.q.shape
    out = p.q.new_empty(batch, seqlen_q, heads, p.v_cache.shape[-1])
    lse = p.q.new_empty(batch, heads, seqlen_q, dtype=accumulator_dtype(p.q))
    for b, sequence in enumerate(decode_sequences(p)):
        out[b : b + 1], lse[b : b + 1] = _attention_dense(sequence)
    return out, lse


def decode_sequences(p: DecodeProblem) -> Iterator[AttentionProblem]:
    """Appends to the cache, and gives each sequence as a dense problem of batch 1 over its keys."""
    seqlen_q, seqlen_new = p.q.shape[1], 0 if p.k is None else p.k.shape[1]
    windowed = p.window_left >= 0 or p.window_right >= 0
    lengths = p.cache_seqlens.tolist()
    starts = [0] * len(lengths) if p.cache_leftpad is None else p.cache_leftpad.tolist()
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if p.k is not None and p.v is not None:
            positions = torch.arange(length, length + seqlen_new, device=p.q.device)
            place = _cache_place(p, b, positions)
            p.k_cache[place] = _rotate(p, p.k[b], positions)
            p.v_cache[place] = p.v[b]
        place = _cache_place(p, b, torch.arange(start, length + seqlen_new, device=p.q.device))
        positions = length + torch.arange(seqlen_q, device=p.q.device) * windowed
        slopes = p.alibi_slopes
        yield AttentionProblem(
            q=_rotate(p, p.q[b], positions)[None],
            k=p.k_cache[place][None],
            v=p.v_cache[place][None],
            alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
            sinks=p.sinks,
            window_left=p.window_left,
            window_right=p.window_right,
            scale=p.scale,
            softcap=p.softcap,
        )


def _cache_place(p: DecodeProblem, b: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The first two indices into the cache of these positions of sequence b."""
    if p.block_table is not None:
        page_size = p.k_cache.shape[1]
        return p.block_table[b].long()[positions // page_size], positions % page_size
    row = b if p.cache_batch_idx is None else int(p.cache_batch_idx[b])
    return torch.full_like(positions, row), positions


def _rotate(p: DecodeProblem, x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of x (S, H, D) at `positions` (S,): its first rotary_dim elements, in pairs.

    Su et al., "RoFormer", 2021. Pairs are (2i, 2i + 1) if interleaved, else (i, i + rotary_dim/2).
    """
    if p.rotary_cos is None or p.rotary_sin is None:
        return x
    dtype = accumulator_dtype(x)
    cos, sin = (table[positions].to(dtype)[:, None] for table in (p.rotary_cos, p.rotary_sin))
    rotary_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary_dim].to(dtype), x[..., rotary_dim:]
    pair_axis, shape = (-1, (-1, 2)) if p.rotary_interleaved else (-2, (2, -1))
    first, second = rotated.unflatten(-1, shape).unbind(pair_axis)
    pairs = torch.stack((first * cos - second * sin, first * sin + second * cos), pair_axis)
    return torch.cat((pairs.flatten(-2).to(x.dtype), rest), dim=-1)
