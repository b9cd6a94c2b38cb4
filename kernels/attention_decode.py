"""A few queries against a long KV cache, contiguous or paged. Its limit is reading K and V once.

The query heads of a KV head, times the queries, are the rows of one tile, so that a key is read for
all of them at once. The keys of a sequence are split over programs, whose results a second kernel
merges: a split has its own softmax, with lse_s and out_s, and

    lse = log Σ_s exp(lse_s)      out = Σ_s exp(lse_s − lse) · out_s

where a sink is one more score (Dao et al., "Flash-Decoding", 2023). As in attention_fwd.py, a tile
into which the NaN of a hidden key got is computed again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.problem import DecodeProblem
from fastattn.rotary import rotate_queries

from . import configs
from .arguments import constants_of, heads_of, mods_of, padded, rows_of, window_of
from .configs import Tile, cdiv, next_power_of_2
from .kv_cache import cache_append, cache_of, cache_offsets
from .launch import Launch, launcher
from .primitives import (
    LN2,
    LOG2E,
    Heads,
    Place,
    add_key,
    add_sink,
    blocks_seen,
    is_spoiled,
    load_at,
    natural_lse,
    online_softmax,
    scores_from,
    store_at,
)


@triton.jit
def attn_decode_kernel(
    q,  # Heads (B, S_q, H_q, D)
    cache,
    out,  # Heads (B, S_q, H_q, D_v), of each split out_split elements apart
    out_split,
    lse,  # Heads (B, S_q, H_q), lse_split apart
    lse_split,
    sinks,  # None where there are splits: it is a score of the whole
    window,
    mods,
    seqlen_q,
    heads_k,
    tiles,  # of seqlen_q · GROUP_SIZE rows
    splits,  # the grid is (splits · tiles · H_k · B,)
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
    split, tile = program % splits, program // splits % tiles
    head_k, batch = program // splits // tiles % heads_k, program // splits // tiles // heads_k
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, heads = index // GROUP_SIZE, head_k * GROUP_SIZE + index % GROUP_SIZE
    there = rows < seqlen_q
    start = 0
    if cache.leftpad is not None:
        start = tl.load(cache.leftpad + batch)
    seqlen_k = tl.maximum(tl.load(cache.seqlens + batch) + cache.seqlen_new - start, 0)
    place = Place(batch, heads[:, None], 0, 0, seqlen_q, seqlen_k)

    b, h = tl.cast(batch, tl.int64), tl.cast(head_k, tl.int64)
    q_offsets = b * q.batch + rows.to(tl.int64) * q.seq + heads.to(tl.int64) * q.head
    q_tile = load_at(q.data, q_offsets, there, HEAD_DIM, BLOCK_D, True)
    first = tile * BLOCK_M // GROUP_SIZE
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP_SIZE, seqlen_q - 1)
    seen = blocks_seen(
        first, last, seqlen_k - seqlen_q, seqlen_k, window.left, window.right, BLOCK_N
    )
    share = tl.cdiv(tl.cdiv(seen.end - seen.begin, BLOCK_N), splits) * BLOCK_N
    begin = seen.begin + split * share
    end = tl.minimum(begin + share, seen.end)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for first_key in tl.range(begin, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        exists = seen_by_any(first, last, place, window, keys)
        k_offsets = cache_offsets(cache.k, cache, batch, start + keys, exists) + h * cache.k.head
        k_tile = load_at(cache.k.data, k_offsets, exists, HEAD_DIM, BLOCK_D, True)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s, _ = scores_from(qk, mods, place, window, rows[:, None], keys[None, :], True)
        weights, row_scale, row_max, row_sum = online_softmax(s, mods.unit, row_max, row_sum)
        v_offsets = cache_offsets(cache.v, cache, batch, start + keys, exists) + h * cache.v.head
        v_tile = load_at(cache.v.data, v_offsets, exists, HEAD_DIM_V, BLOCK_DV, True)
        acc = tl.dot(
            weights.to(v_tile.dtype), v_tile, acc * row_scale[:, None], input_precision=PRECISION
        )
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=there, other=0.0)
        row_scale, row_max, row_sum = add_sink(sink, mods.unit, row_max, row_sum)
        acc *= row_scale[:, None]

    row_lse = natural_lse(mods.unit, row_max, row_sum)
    at_split = tl.cast(split, tl.int64)
    at_lse = lse.data + at_split * lse_split + b * lse.batch
    lse_offsets = rows.to(tl.int64) * lse.seq + heads.to(tl.int64) * lse.head
    tl.store(at_lse + lse_offsets, row_lse, mask=there)
    acc *= (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    at_out = out.data + at_split * out_split + b * out.batch
    offsets = rows.to(tl.int64) * out.seq + heads.to(tl.int64) * out.head
    store_at(at_out, offsets, there, acc, HEAD_DIM_V, BLOCK_DV)

    # A single query sees all that is loaded. Of several, one may have got a hidden key's 0 · NaN.
    if seqlen_q != 1 and ((window.left is not None) or (window.right is not None)):
        spoiled = is_spoiled(acc, row_lse)
        if spoiled:
            tl.debug_barrier()  # out and lse were written by other threads
            for part in tl.range(0, BLOCK_M, 16, num_stages=1):
                decode_one_by_one(
                    tile * BLOCK_M + part, begin, end, start, q, cache, at_out, out, at_lse, lse,
                    batch, head_k, mods, place, window, GROUP_SIZE,
                    HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                )  # fmt: skip


@triton.jit
def seen_by_any(first, last, place, window, keys):
    """Of the queries first ≤ i ≤ last."""
    diagonal = place.seqlen_k - place.seqlen_q
    seen = keys < place.seqlen_k
    if window.left is not None:
        seen &= keys >= first + diagonal - window.left
    if window.right is not None:
        seen &= keys <= last + diagonal + window.right
    return seen


@triton.jit
def decode_one_by_one(
    first, begin, end, start, q, cache, at_out, out, at_lse, lse,
    batch, head_k, mods, place, window, GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The outputs of 16 rows of a tile again, from their lse, a key at a time."""
    index = first + tl.arange(0, 16)
    rows, heads = index // GROUP_SIZE, head_k * GROUP_SIZE + index % GROUP_SIZE
    there = rows < place.seqlen_q
    place = Place(batch, heads[:, None], 0, 0, place.seqlen_q, place.seqlen_k)
    at_rows, at_heads = rows.to(tl.int64), heads.to(tl.int64)
    at_q = q.data + tl.cast(batch, tl.int64) * q.batch
    q_tile = load_at(at_q, at_rows * q.seq + at_heads * q.head, there, HEAD_DIM, BLOCK_D, True)
    q_tile = q_tile.to(tl.float32)
    row_lse = tl.load(
        at_lse + at_rows * lse.seq + at_heads * lse.head, mask=there, other=float("inf")
    )
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    acc = tl.zeros((16, BLOCK_DV), tl.float32)
    columns, columns_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    h = tl.cast(head_k, tl.int64)
    for key in tl.range(begin, tl.minimum(end, place.seqlen_k), num_stages=1):
        at_k = cache.k.data + cache_offsets(cache.k, cache, batch, start + key, True)
        at_v = cache.v.data + cache_offsets(cache.v, cache, batch, start + key, True)
        k_row = tl.load(at_k + h * cache.k.head + columns, mask=columns < HEAD_DIM, other=0.0)
        v_row = tl.load(at_v + h * cache.v.head + columns_v, mask=columns_v < HEAD_DIM_V, other=0.0)
        acc = add_key(acc, q_tile, k_row, v_row, row_lse, mods, place, window, rows, key)
    offsets = at_rows * out.seq + at_heads * out.head
    store_at(at_out, offsets, there, acc, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def attn_decode_combine_kernel(
    outs,  # (splits, rows, D_v) fp32
    lses,  # (splits, rows) fp32
    out,  # (rows, D_v)
    lse,  # Heads (B, S_q, H_q)
    sinks,
    rows,  # B · S_q · H_q, in this order
    seqlen_q,
    heads,
    splits,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One row a program."""
    row = tl.cast(tl.program_id(0), tl.int64)
    head, query = row % heads, row // heads % seqlen_q
    batch = row // heads // seqlen_q
    all_splits, columns = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DV)
    split_lse = tl.load(
        lses + all_splits * rows + row, mask=all_splits < splits, other=float("-inf")
    )
    most = tl.max(split_lse, 0)
    if sinks is not None:
        most = tl.maximum(most, tl.load(sinks + head))
    shift = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.exp2((split_lse - shift) * LOG2E), 0)
    if sinks is not None:
        total += tl.exp2((tl.load(sinks + head) - shift) * LOG2E)
    row_lse = tl.where(total == 0.0, float("-inf"), shift + tl.log2(total) * LN2)
    tl.store(lse.data + batch * lse.batch + query * lse.seq + head * lse.head, row_lse)

    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for split in tl.range(0, splits):
        at = tl.cast(split, tl.int64) * rows + row
        weight = tl.exp2((tl.load(lses + at) - shift) * LOG2E)
        acc += weight * tl.load(
            outs + at * HEAD_DIM_V + columns, mask=columns < HEAD_DIM_V, other=0.0
        )
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out + row * HEAD_DIM_V + columns,
        acc.to(out.dtype.element_ty),
        mask=columns < HEAD_DIM_V,
    )


# --- launches -------------------------------------------------------------------------------------


def _tile(p: DecodeProblem, *_: Any) -> Tile:
    seqlen_q, heads, head_dim = p.q.shape[1:]
    heads_k, head_dim_v = p.v_cache.shape[-2:]
    block_d = padded(max(head_dim, head_dim_v))
    return configs.attention_decode(p.q.dtype, block_d, seqlen_q * (heads // heads_k))


@launcher(_tile, tuned=True)
def _decode(tile: Tile, p: DecodeProblem, outs: Tensor, lses: Tensor, splits: int) -> Launch:
    """outs (splits, B, S_q, H_q, D_v), and lses (splits, B, H_q, S_q) of whatever strides."""
    batch, seqlen_q, heads, _ = p.q.shape
    heads_k = p.v_cache.shape[-2]
    tiles = cdiv(seqlen_q * (heads // heads_k), tile.block_m)
    arguments = (
        heads_of(p.q, False),
        cache_of(p),
        Heads(outs, *outs.stride()[1:4]),
        outs.stride(0),
        Heads(lses, lses.stride(1), lses.stride(3), lses.stride(2)),
        lses.stride(0),
        p.sinks if splits == 1 else None,
        window_of(p),
        mods_of(p),
        seqlen_q,
        heads_k,
        tiles,
        splits,
    )
    programs = splits * tiles * heads_k * batch
    constants = constants_of(p.q, p.v_cache, tile)
    return Launch(attn_decode_kernel, programs, arguments, constants, tile)


@launcher(lambda *_: configs.ONE_ROW)
def _combine(
    tile: Tile, p: DecodeProblem, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor
) -> Launch:
    splits, _, seqlen_q, heads, head_dim_v = outs.shape
    rows = lse.numel()
    arguments = (outs, lses, out, rows_of(lse, False), p.sinks, rows, seqlen_q, heads, splits)
    constants = {
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_SPLITS": next_power_of_2(splits),
        "BLOCK_DV": padded(head_dim_v),
    }
    return Launch(attn_decode_combine_kernel, rows, arguments, constants, tile)


def attn_decode(p: DecodeProblem) -> tuple[Tensor, Tensor]:
    """(out, lse), after the append to p's caches."""
    if p.k is not None:
        cache_append(p)
    p = p._replace(q=rotate_queries(p))
    batch, seqlen_q, heads, _ = p.q.shape
    head_dim_v = p.v_cache.shape[-1]
    out = p.q.new_empty((batch, seqlen_q, heads, head_dim_v))
    lse = p.q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if (splits := _splits(p)) == 1:
        _decode(p, out[None], lse[None], 1)
    else:
        outs = p.q.new_empty((splits, *out.shape), dtype=torch.float32)
        lses = p.q.new_empty((splits, batch, seqlen_q, heads), dtype=torch.float32)
        _decode(p, outs, lses.transpose(2, 3), splits)
        _combine(p, outs, lses, out, lse)
    return out, lse


def _splits(p: DecodeProblem) -> int:
    """How many programs share the keys of a head; the most keys that a sequence may have count, for
    how many it has is on the GPU."""
    batch, seqlen_q, heads, _ = p.q.shape
    heads_k, tile = p.v_cache.shape[-2], _tile(p)
    tiles = cdiv(seqlen_q * (heads // heads_k), tile.block_m)
    capacity = p.k_cache.shape[1] * (1 if p.block_table is None else p.block_table.shape[1])
    blocks = cdiv(capacity, tile.block_n)
    return min(p.num_splits or configs.splits(tiles * heads_k * batch, blocks), max(blocks, 1))
