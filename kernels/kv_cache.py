"""The KV cache that decoding reads, contiguous or paged, and the kernel that appends keys, which it
rotates, and values to it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.problem import DecodeProblem

from . import configs
from .arguments import heads_of
from .configs import Tile, next_power_of_2
from .launch import Launch, launcher


class Cache(NamedTuple):
    k: Any  # Heads of rows, or pages, by position
    v: Any
    seqlens: Any  # (B,) int32, before the append
    seqlen_new: Any  # keys appended
    block_table: Any  # (B, pages) int32 or None
    table_stride: Any
    page_size: Any
    rows: Any  # (B,) int32 or None: the sequence's row of a cache that isn't paged
    leftpad: Any  # (B,) int32 or None: the first position with a key


@triton.jit
def cache_offsets(x, cache, batch, positions, there):
    """Where the rows at these positions of a sequence lie in x, the cache's K or V; of head 0."""
    if cache.block_table is None:
        row = tl.cast(batch, tl.int64)
        if cache.rows is not None:
            row = tl.load(cache.rows + batch).to(tl.int64)
        return row * x.batch + positions.to(tl.int64) * x.seq
    else:
        at = cache.block_table + tl.cast(batch, tl.int64) * cache.table_stride
        page = tl.load(at + positions // cache.page_size, mask=there, other=0).to(tl.int64)
        return page * x.batch + (positions % cache.page_size).to(tl.int64) * x.seq


def cache_of(p: DecodeProblem) -> Cache:
    return Cache(
        k=heads_of(p.k_cache, False),
        v=heads_of(p.v_cache, False),
        seqlens=p.cache_seqlens,
        seqlen_new=0 if p.k is None else p.k.shape[1],
        block_table=p.block_table,
        table_stride=0 if p.block_table is None else p.block_table.stride(0),
        page_size=p.k_cache.shape[1],
        rows=p.cache_batch_idx,
        leftpad=p.cache_leftpad,
    )


@triton.jit
def cache_append_kernel(
    k,  # Heads (B, S_new, H_k, D)
    v,
    cache,
    cos,  # (positions, R), rows cos_stride apart; or None
    sin,
    cos_stride,
    sin_stride,
    heads_k,
    INTERLEAVED: tl.constexpr,
    ROTARY_PAIRS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One key and value of one head a program."""
    program = tl.program_id(0)
    head, i = program % heads_k, program // heads_k % cache.seqlen_new
    batch = program // heads_k // cache.seqlen_new
    position = tl.load(cache.seqlens + batch) + i
    b, s, h = tl.cast(batch, tl.int64), tl.cast(i, tl.int64), tl.cast(head, tl.int64)
    from_k = k.data + b * k.batch + s * k.seq + h * k.head
    from_v = v.data + b * v.batch + s * v.seq + h * v.head
    to_k = cache.k.data + cache_offsets(cache.k, cache, batch, position, True) + h * cache.k.head
    to_v = cache.v.data + cache_offsets(cache.v, cache, batch, position, True) + h * cache.v.head

    columns = tl.arange(0, BLOCK_DV)
    tl.store(
        to_v + columns,
        tl.load(from_v + columns, mask=columns < HEAD_DIM_V, other=0.0),
        mask=columns < HEAD_DIM_V,
    )
    columns = tl.arange(0, BLOCK_D)
    rest = (columns >= 2 * ROTARY_PAIRS) & (columns < HEAD_DIM)
    tl.store(to_k + columns, tl.load(from_k + columns, mask=rest, other=0.0), mask=rest)
    if ROTARY_PAIRS > 0:
        pairs = tl.arange(0, BLOCK_R)
        there = pairs < ROTARY_PAIRS
        first, second = pairs, pairs + ROTARY_PAIRS
        if INTERLEAVED:
            first, second = 2 * pairs, 2 * pairs + 1
        x = tl.load(from_k + first, mask=there, other=0.0).to(tl.float32)
        y = tl.load(from_k + second, mask=there, other=0.0).to(tl.float32)
        row = tl.cast(position, tl.int64)
        c = tl.load(cos + row * cos_stride + pairs, mask=there, other=0.0).to(tl.float32)
        d = tl.load(sin + row * sin_stride + pairs, mask=there, other=0.0).to(tl.float32)
        dtype = cache.k.data.dtype.element_ty
        tl.store(to_k + first, (x * c - y * d).to(dtype), mask=there)
        tl.store(to_k + second, (x * d + y * c).to(dtype), mask=there)


@launcher(lambda *_: configs.ONE_ROW)
def cache_append(tile: Tile, p: DecodeProblem) -> Launch:
    assert p.k is not None and p.v is not None
    batch, seqlen_new, heads_k, head_dim = p.k.shape
    pairs = 0 if p.rotary_cos is None else p.rotary_cos.shape[1]
    cos, sin = (p.rotary_cos, p.rotary_sin) if pairs else (None, None)
    arguments = (
        heads_of(p.k, False),
        heads_of(p.v, False),
        cache_of(p),
        cos,
        sin,
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        heads_k,
    )
    constants = {
        "INTERLEAVED": p.rotary_interleaved,
        "ROTARY_PAIRS": pairs,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": p.v.shape[-1],
        "BLOCK_R": next_power_of_2(max(pairs, 1)),
        "BLOCK_D": next_power_of_2(head_dim),
        "BLOCK_DV": next_power_of_2(p.v.shape[-1]),
    }
    return Launch(cache_append_kernel, batch * seqlen_new * heads_k, arguments, constants, tile)
