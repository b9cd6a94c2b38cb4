"""Forward attention: out = softmax(scores) V and lse, one program a tile of queries of one head.

A program keeps BLOCK_M queries and goes over the keys they see, BLOCK_N at a time, with an online
softmax (Milakov, Gimelshein, 2018; Dao et al., "FlashAttention", 2022). Only blocks that an edge
of the window or the end of the keys crosses are checked. Tiles of the last queries come first: of
a causal problem they are the longest.

A hidden key has weight 0, but 0 · NaN is NaN: where V is not finite, P·V spreads it to rows that
do not see it. A tile that comes out with NaN although its lse are numbers is computed again, a key
at a time. The loop over keys pays nothing for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.problem import AttentionProblem

from . import configs
from .arguments import (
    batch_of,
    constants_of,
    heads_of,
    lengths_of,
    mods_of,
    rows_of,
    window_of,
    work_of,
)
from .configs import Tile, cdiv
from .launch import Launch, launcher
from .primitives import (
    ScoreMods,
    add_key,
    add_sink,
    all_edges,
    block_at,
    blocks_seen,
    count_of,
    head_at,
    is_spoiled,
    kept,
    load_lse,
    load_rows,
    natural_lse,
    online_softmax,
    place_of,
    scores_from,
    store_rows,
)


@triton.jit
def attn_fwd_kernel(
    q,  # Heads (B, S_q, H_q, D)
    k,
    v,
    out,  # Heads (B, S_q, H_q, D_v)
    lse,  # Heads (B, S_q, H_q) of one fp32 each
    sinks,  # (H_q,) fp32 or None
    lengths,  # Lengths
    window,  # Window
    mods,  # ScoreMods
    heads,  # H_q
    m_blocks,  # of the longest sequence; the grid is (m_blocks · H_q · B,)
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # the head dims, filled up with zeros
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of fp32
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
    rows = first + tl.arange(0, BLOCK_M)
    at_q = head_at(q, batch, place.first_q, head)
    at_k = head_at(k, batch, place.first_k, head // GROUP_SIZE)
    at_v = head_at(v, batch, place.first_k, head // GROUP_SIZE)
    q_tile = load_rows(at_q, q.seq, rows, place.seqlen_q, HEAD_DIM, BLOCK_D, True)

    last = tl.minimum(first + BLOCK_M, place.seqlen_q) - 1
    blocks = blocks_seen(
        first, last, place.seqlen_k - place.seqlen_q, place.seqlen_k,
        window.left, window.right, BLOCK_N,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if mods.seed is None:
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, blocks, False,
            q_tile, at_k, k.seq, at_v, v.seq, rows, mods, place, window,
            HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    else:
        blocks = all_edges(blocks)
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, blocks, True,
        q_tile, at_k, k.seq, at_v, v.seq, rows, mods, place, window,
        HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    if sinks is not None:
        row_scale, row_max, row_sum = add_sink(tl.load(sinks + head), mods.unit, row_max, row_sum)
        acc *= row_scale[:, None]

    row_lse = natural_lse(mods.unit, row_max, row_sum)
    at_lse = head_at(lse, batch, place.first_q, head) + rows.to(tl.int64) * lse.seq
    tl.store(at_lse, row_lse, mask=rows < place.seqlen_q)
    acc *= (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    if mods.seed is not None:
        acc *= mods.keep_scale
    at_out = head_at(out, batch, place.first_q, head)
    store_rows(at_out, out.seq, rows, place.seqlen_q, acc, HEAD_DIM_V, BLOCK_DV)

    if (mods.mask is not None) or (window.left is not None) or (window.right is not None):
        spoiled = is_spoiled(acc, row_lse)
        if spoiled:
            tl.debug_barrier()  # out and lse were written by other threads
            for part in tl.range(first, last + 1, 16, num_stages=1):
                attend_one_by_one(
                    part, blocks.begin, blocks.end, at_q, q.seq, at_k, k.seq, at_v, v.seq,
                    at_out, out.seq, lse, mods, place, window,
                    HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                )  # fmt: skip


@triton.jit
def attend(
    acc, row_max, row_sum, blocks, CHECK: tl.constexpr,
    q_tile, at_k, k_stride, at_v, v_stride, rows, mods, place, window,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys at the edges, which it checks, or all others to (Σ weights · V, row_max,
    row_sum)."""
    for i in tl.range(0, count_of(blocks, window.left, CHECK, BLOCK_N)):
        first_key = block_at(blocks, window.left, i, CHECK, BLOCK_N)
        keys = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_rows(at_k, k_stride, keys, place.seqlen_k, HEAD_DIM, BLOCK_D, CHECK)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s, _ = scores_from(qk, mods, place, window, rows[:, None], keys[None, :], CHECK)
        weights, row_scale, row_max, row_sum = online_softmax(s, mods.unit, row_max, row_sum)
        if mods.seed is not None:
            weights = tl.where(kept(mods, place, rows, first_key, BLOCK_N), weights, 0.0)
        v_tile = load_rows(at_v, v_stride, keys, place.seqlen_k, HEAD_DIM_V, BLOCK_DV, CHECK)
        acc = tl.dot(
            weights.to(v_tile.dtype), v_tile, acc * row_scale[:, None], input_precision=PRECISION
        )
    return acc, row_max, row_sum


@triton.jit
def attend_one_by_one(
    first, begin, end, at_q, q_stride, at_k, k_stride, at_v, v_stride, at_out, out_stride, lse,
    mods, place, window, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The outputs of 16 queries from known lse, of a key at a time, so that none reaches what does
    not see it. Few rows: the loop over keys needs the registers."""
    rows = first + tl.arange(0, 16)
    q_tile = load_rows(at_q, q_stride, rows, place.seqlen_q, HEAD_DIM, BLOCK_D, True)
    q_tile = q_tile.to(tl.float32)
    row_lse = load_lse(lse, place, rows)
    acc = tl.zeros((16, BLOCK_DV), tl.float32)
    columns, columns_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for key in tl.range(begin, tl.minimum(end, place.seqlen_k), num_stages=1):
        row = tl.cast(key, tl.int64)
        k_row = tl.load(at_k + row * k_stride + columns, mask=columns < HEAD_DIM, other=0.0)
        v_row = tl.load(at_v + row * v_stride + columns_v, mask=columns_v < HEAD_DIM_V, other=0.0)
        acc = add_key(acc, q_tile, k_row, v_row, row_lse, mods, place, window, rows, key)
    store_rows(at_out, out_stride, rows, place.seqlen_q, acc, HEAD_DIM_V, BLOCK_DV)


def _tile(p: AttentionProblem, *_: Tensor) -> Tile:
    return configs.attention_fwd(work_of(p.q, p.v.shape[-1], mods_of(p)), lengths_of(p).q)


@launcher(_tile, tuned=True)
def _fwd(tile: Tile, p: AttentionProblem, out: Tensor, lse: Tensor) -> Launch:
    packed, lengths, heads = p.packed, lengths_of(p), p.q.shape[-2]
    m_blocks = cdiv(lengths.q, tile.block_m)
    arguments = (
        heads_of(p.q, packed),
        heads_of(p.k, packed),
        heads_of(p.v, packed),
        heads_of(out, packed),
        rows_of(lse, packed),
        p.sinks,
        lengths,
        window_of(p),
        mods_of(p),
        heads,
        m_blocks,
    )
    programs = m_blocks * heads * batch_of(p)
    return Launch(attn_fwd_kernel, programs, arguments, constants_of(p.q, p.v, tile), tile)


def attn_fwd(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """(out, lse): out of q's dtype, contiguous."""
    *outer, heads, _ = p.q.shape
    out_shape = (*outer, heads, p.v.shape[-1])
    if p.packed:  # tokens behind the last sequence are no program's
        out = p.q.new_zeros(out_shape)
        lse = p.q.new_full((heads, *outer), -torch.inf, dtype=torch.float32)
    else:
        batch, seqlen = outer
        out = p.q.new_empty(out_shape)
        lse = p.q.new_empty((batch, heads, seqlen), dtype=torch.float32)
    _fwd(p, out, lse)
    return out, lse
