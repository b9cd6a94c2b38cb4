"""Gradients of attention, recomputed from q, k, v, out and lse: twice the same bits, but for a bias
that several scores share (Dao et al., "FlashAttention", 2022, appendix B.4).

    delta = rowsum(dO ∘ O) − dlse      P = exp(S − lse)      dP = dO·Vᵀ
    dS = P ∘ (dP − delta)              dV = Pᵀ·dO    dK = scale · dSᵀ·Q    dQ = scale · dS·K

A program of the first kernel keeps BLOCK_M queries and goes over the keys they see, for dQ, delta
and the bias's gradient. One of the second keeps BLOCK_N keys and goes over the queries that see
them, of all query heads of their group, for dK and dV; its tiles are transposed, so that Pᵀ and dSᵀ
come out as operands of the next product. S is computed twice; in return nothing is added by two
programs.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.problem import AttentionProblem, QKVGradients, last_stride_one

from . import configs
from .arguments import (
    batch_of,
    constants_of,
    heads_of,
    lengths_of,
    mods_of,
    rows_of,
    scores_of,
    window_of,
    work_of,
)
from .configs import Tile, cdiv
from .launch import Launch, launcher
from .primitives import (
    LOG2E,
    Place,
    ScoreMods,
    all_edges,
    at_scores,
    block_at,
    blocks_seen,
    count_of,
    head_at,
    kept,
    load_lse,
    load_rows,
    place_of,
    scores_from,
    store_rows,
)


@triton.jit
def attn_bwd_dq_kernel(
    q,  # Heads (B, S_q, H_q, D)
    k,
    v,
    out,  # Heads (B, S_q, H_q, D_v)
    dout,
    dq,
    lse,  # Heads (B, S_q, H_q) of one fp32 each
    dlse,  # or None
    delta,
    dbias,  # Scores of fp32, zeros; or None
    lengths,
    window,
    mods,
    scale,
    heads,
    m_blocks,
    BIAS_IS_SHARED: tl.constexpr,  # an element of dbias belongs to several scores
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    mods = ScoreMods(
        mods.unit, mods.scale, mods.softcap, mods.mask, mods.bias, mods.alibi_slopes,
        mods.alibi_stride, mods.seed, mods.threshold, mods.keep_scale,
    )  # fmt: skip
    first = (m_blocks - 1 - program % m_blocks) * BLOCK_M
    head, batch = program // m_blocks % heads, program // m_blocks // heads
    place = place_of(lengths, batch, head)
    if first >= place.seqlen_q:
        return
    rows, end = first + tl.arange(0, BLOCK_M), place.seqlen_q
    at_k = head_at(k, batch, place.first_k, head // GROUP_SIZE)
    at_v = head_at(v, batch, place.first_k, head // GROUP_SIZE)
    at_q = head_at(q, batch, place.first_q, head)
    q_tile = load_rows(at_q, q.seq, rows, end, HEAD_DIM, BLOCK_D, True)
    at_out = head_at(out, batch, place.first_q, head)
    at_dout = head_at(dout, batch, place.first_q, head)
    out_tile = load_rows(at_out, out.seq, rows, end, HEAD_DIM_V, BLOCK_DV, True)
    dout_tile = load_rows(at_dout, dout.seq, rows, end, HEAD_DIM_V, BLOCK_DV, True)

    row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        at_dlse = head_at(dlse, batch, place.first_q, head) + rows.to(tl.int64) * dlse.seq
        row_delta -= tl.load(at_dlse, mask=rows < end, other=0.0)
    at_delta = head_at(delta, batch, place.first_q, head) + rows.to(tl.int64) * delta.seq
    tl.store(at_delta, row_delta, mask=rows < end)
    row_lse = load_lse(lse, place, rows)

    blocks = blocks_seen(
        first, tl.minimum(first + BLOCK_M, end) - 1, place.seqlen_k - place.seqlen_q,
        place.seqlen_k, window.left, window.right, BLOCK_N,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if mods.seed is None:
        acc = add_dq(
            acc, blocks, False, q_tile, dout_tile, row_lse, row_delta,
            at_k, k.seq, at_v, v.seq, dbias, rows, mods, place, window, BIAS_IS_SHARED,
            HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    else:
        blocks = all_edges(blocks)
    acc = add_dq(
        acc, blocks, True, q_tile, dout_tile, row_lse, row_delta,
        at_k, k.seq, at_v, v.seq, dbias, rows, mods, place, window, BIAS_IS_SHARED,
        HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    at_dq = head_at(dq, batch, place.first_q, head)
    store_rows(at_dq, dq.seq, rows, end, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def add_dq(
    acc, blocks, CHECK: tl.constexpr, q_tile, dout_tile, row_lse, row_delta,
    at_k, k_stride, at_v, v_stride, dbias, rows, mods, place, window,
    BIAS_IS_SHARED: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + dS · K of the keys at the edges, which it checks, or of all others; writes their
    dbias."""
    for i in tl.range(0, count_of(blocks, window.left, CHECK, BLOCK_N)):
        first_key = block_at(blocks, window.left, i, CHECK, BLOCK_N)
        keys = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_rows(at_k, k_stride, keys, place.seqlen_k, HEAD_DIM, BLOCK_D, CHECK)
        v_tile = load_rows(at_v, v_stride, keys, place.seqlen_k, HEAD_DIM_V, BLOCK_DV, CHECK)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s, slope = scores_from(qk, mods, place, window, rows[:, None], keys[None, :], CHECK)
        weights = tl.exp2((s * mods.unit - row_lse[:, None]) * LOG2E)
        dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        if mods.seed is not None:
            keep = kept(mods, place, rows, first_key, BLOCK_N)
            dweights = tl.where(keep, dweights * mods.keep_scale, 0.0)
        dscores = weights * (dweights - row_delta[:, None])
        if CHECK or mods.mask is not None or mods.bias is not None:
            # NaN of the hidden stays behind: that of the seen is in lse, and so in dscores already.
            dscores = tl.where(s == float("-inf"), 0.0, dscores)
            k_tile = tl.where(tl.abs(k_tile.to(tl.float32)) < float("inf"), k_tile, 0.0)
        if dbias is not None:
            at = at_scores(dbias, place, rows[:, None], keys[None, :])
            there = (rows < place.seqlen_q)[:, None] & (keys < place.seqlen_k)[None, :]
            if BIAS_IS_SHARED:
                tl.atomic_add(at, dscores, mask=there, sem="relaxed")
            else:
                tl.store(at, dscores, mask=there)
        acc = tl.dot((dscores * slope).to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def attn_bwd_dkv_kernel(
    q,
    k,
    v,
    dout,
    dk,
    dv,
    lse,
    delta,
    lengths,
    window,
    mods,
    scale,
    heads_k,
    n_blocks,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    mods = ScoreMods(
        mods.unit, mods.scale, mods.softcap, mods.mask, mods.bias, mods.alibi_slopes,
        mods.alibi_stride, mods.seed, mods.threshold, mods.keep_scale,
    )  # fmt: skip
    first = program % n_blocks * BLOCK_N  # of a causal problem the first keys are seen by the most
    head_k, batch = program // n_blocks % heads_k, program // n_blocks // heads_k
    sequence = place_of(lengths, batch, head_k)
    if first >= sequence.seqlen_k:
        return
    keys, end = first + tl.arange(0, BLOCK_N), sequence.seqlen_k
    at_k = head_at(k, batch, sequence.first_k, head_k)
    at_v = head_at(v, batch, sequence.first_k, head_k)
    k_tile = load_rows(at_k, k.seq, keys, end, HEAD_DIM, BLOCK_D, True)
    v_tile = load_rows(at_v, v.seq, keys, end, HEAD_DIM_V, BLOCK_DV, True)
    # Query i sees key j if j − diagonal − right ≤ i ≤ j − diagonal + left.
    blocks = blocks_seen(
        first, tl.minimum(first + BLOCK_N, end) - 1, sequence.seqlen_q - sequence.seqlen_k,
        sequence.seqlen_q, window.right, window.left, BLOCK_M,
    )  # fmt: skip
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    if mods.seed is None:
        dk_acc, dv_acc = add_dkv(
            dk_acc, dv_acc, blocks, False, k_tile, v_tile,
            q, dout, lse, delta, keys, first, mods, sequence, window, GROUP_SIZE,
            HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    else:
        blocks = all_edges(blocks)
    dk_acc, dv_acc = add_dkv(
        dk_acc, dv_acc, blocks, True, k_tile, v_tile,
        q, dout, lse, delta, keys, first, mods, sequence, window, GROUP_SIZE,
        HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    at_dk = head_at(dk, batch, sequence.first_k, head_k)
    at_dv = head_at(dv, batch, sequence.first_k, head_k)
    store_rows(at_dk, dk.seq, keys, end, dk_acc * scale, HEAD_DIM, BLOCK_D)
    store_rows(at_dv, dv.seq, keys, end, dv_acc, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def add_dkv(
    dk_acc, dv_acc, blocks, CHECK: tl.constexpr, k_tile, v_tile,
    q, dout, lse, delta, keys, first_key, mods, sequence, window, GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(dk_acc + dSᵀ · Q, dv_acc + Pᵀ · dO) of the queries at the edges, or of all others, of every
    head of the group. One loop: with one inside another ptxas spills on sm_100."""
    count = count_of(blocks, window.right, CHECK, BLOCK_M)
    for i in tl.range(0, GROUP_SIZE * count):
        member, block = 0, i
        if GROUP_SIZE > 1:
            member, block = i // count, i % count
        place = Place(
            sequence.batch, sequence.head * GROUP_SIZE + member, sequence.first_q,
            sequence.first_k, sequence.seqlen_q, sequence.seqlen_k,
        )  # fmt: skip
        at_q = head_at(q, place.batch, place.first_q, place.head)
        at_dout = head_at(dout, place.batch, place.first_q, place.head)
        at_delta = head_at(delta, place.batch, place.first_q, place.head)
        first = block_at(blocks, window.right, block, CHECK, BLOCK_M)
        rows = first + tl.arange(0, BLOCK_M)
        q_tile = load_rows(at_q, q.seq, rows, place.seqlen_q, HEAD_DIM, BLOCK_D, CHECK)
        dout_tile = load_rows(at_dout, dout.seq, rows, place.seqlen_q, HEAD_DIM_V, BLOCK_DV, CHECK)
        row_lse = load_lse(lse, place, rows)
        row_delta = tl.load(
            at_delta + rows.to(tl.int64) * delta.seq, mask=rows < place.seqlen_q, other=0.0
        )
        qk = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        s, slope = scores_from(qk, mods, place, window, rows[None, :], keys[:, None], CHECK)
        weights = tl.exp2((s * mods.unit - row_lse[None, :]) * LOG2E)
        dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
        dropped = weights
        if mods.seed is not None:
            keep = tl.trans(kept(mods, place, rows, first_key, BLOCK_N))
            dropped = tl.where(keep, weights * mods.keep_scale, 0.0)
            dweights = tl.where(keep, dweights * mods.keep_scale, 0.0)
        dscores = weights * (dweights - row_delta[None, :])
        if CHECK or mods.mask is not None or mods.bias is not None:
            hidden = s == float("-inf")
            dropped = tl.where(hidden, 0.0, dropped)
            dscores = tl.where(hidden, 0.0, dscores)
        dv_acc = tl.dot(dropped.to(dout_tile.dtype), dout_tile, dv_acc, input_precision=PRECISION)
        dk_acc = tl.dot(
            (dscores * slope).to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION
        )
    return dk_acc, dv_acc


# --- launches -------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """What the kernels read besides the problem and what they write; delta is between them."""

    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None  # fp32; zeros
    bias_is_shared: bool  # an element of dbias belongs to several scores


def _work(p: AttentionProblem) -> configs.Work:
    return work_of(p.q, p.v.shape[-1], mods_of(p))


@launcher(lambda p, *_: configs.attention_bwd_dq(_work(p)), tuned=True)
def _dq(tile: Tile, p: AttentionProblem, *gradients: Any) -> Launch:
    g, packed, lengths, heads = Gradients(*gradients), p.packed, lengths_of(p), p.q.shape[-2]
    m_blocks = cdiv(lengths.q, tile.block_m)
    arguments = (
        heads_of(p.q, packed),
        heads_of(p.k, packed),
        heads_of(p.v, packed),
        heads_of(g.out, packed),
        heads_of(g.dout, packed),
        heads_of(g.dq, packed),
        rows_of(g.lse, packed),
        None if g.dlse is None else rows_of(g.dlse, packed),
        rows_of(g.delta, packed),
        scores_of(g.dbias),
        lengths,
        window_of(p),
        mods_of(p),
        p.scale,
        heads,
        m_blocks,
    )
    constants = constants_of(p.q, p.v, tile) | {"BIAS_IS_SHARED": g.bias_is_shared}
    programs = m_blocks * heads * batch_of(p)
    return Launch(attn_bwd_dq_kernel, programs, arguments, constants, tile)


@launcher(lambda p, *_: configs.attention_bwd_dkv(_work(p)), tuned=True)
def _dkv(tile: Tile, p: AttentionProblem, *gradients: Any) -> Launch:
    g, packed, lengths, heads_k = Gradients(*gradients), p.packed, lengths_of(p), p.k.shape[-2]
    n_blocks = cdiv(lengths.k, tile.block_m)
    arguments = (
        heads_of(p.q, packed),
        heads_of(p.k, packed),
        heads_of(p.v, packed),
        heads_of(g.dout, packed),
        heads_of(g.dk, packed),
        heads_of(g.dv, packed),
        rows_of(g.lse, packed),
        rows_of(g.delta, packed),
        lengths,
        window_of(p),
        mods_of(p),
        p.scale,
        heads_k,
        n_blocks,
    )
    keys_kept = tile._replace(block_m=tile.block_n, block_n=tile.block_m)
    constants = constants_of(p.q, p.v, keys_kept)
    programs = n_blocks * heads_k * batch_of(p)
    return Launch(attn_bwd_dkv_kernel, programs, arguments, constants, tile)


def attn_bwd(
    p: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    deterministic: bool,
    into: QKVGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, and dbias and dsinks where p has them. Atomics add up the gradient of a shared
    bias, in no fixed order; to be deterministic it is first made for every score."""
    # Tokens behind the last packed sequence are no program's.
    dq, dk, dv = into or (t.new_empty(t.shape) for t in p[:3])
    if p.packed:
        for gradient in (dq, dk, dv):
            gradient.zero_()
    delta = torch.zeros_like(lse) if p.packed else torch.empty_like(lse)
    dbias, shared = None, False
    if p.bias is not None:
        shape = p.scores_shape
        shared = p.bias.shape != shape and not deterministic
        dbias = p.bias.new_zeros(p.bias.shape if shared else shape, dtype=torch.float32)
    g = Gradients(out, lse, last_stride_one(dout), dlse, delta, dq, dk, dv, dbias, shared)
    _dq(p, *g)
    _dkv(p, *g)
    if p.bias is not None and dbias is not None:
        dbias = dbias.sum_to_size(p.bias.shape).to(p.bias.dtype)
    return dq, dk, dv, dbias, _dsinks(p, lse, delta)


def _dsinks(p: AttentionProblem, lse: Tensor, delta: Tensor) -> Tensor | None:
    if p.sinks is None:
        return None
    weights = torch.exp(p.sinks[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
    dsinks = -(weights * delta).sum(-1)
    return dsinks if p.packed else dsinks.sum(0)
