"""How spread out each query's weights are, −Σ w · log w, from what the forward pass has left.

With w = exp(s − lse) that is Σ w · (lse − s): no value is read, and no maximum kept. A program has
a tile of queries of one head, and goes over the keys that they see.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.problem import AttentionProblem

from . import configs
from .arguments import (
    batch_of,
    heads_of,
    lengths_of,
    mods_of,
    padded,
    precision_of,
    rows_of,
    window_of,
    work_of,
)
from .configs import Tile, cdiv
from .launch import Launch, launcher
from .primitives import (
    LOG2E,
    ScoreMods,
    blocks_seen,
    head_at,
    load_lse,
    load_rows,
    place_of,
    scores_from,
)


@triton.jit
def attn_entropy_kernel(
    q,  # Heads (B, S_q, H_q, D)
    k,
    lse,  # Heads (B, S_q, H_q) of one fp32 each
    entropy,  # alike
    lengths,  # Lengths
    window,  # Window
    mods,  # ScoreMods
    heads,  # H_q
    m_blocks,  # of the longest sequence; the grid is (m_blocks · H_q · B,)
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # the head dim, filled up with zeros
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
    at_k = head_at(k, batch, place.first_k, head // GROUP_SIZE)
    q_tile = load_rows(
        head_at(q, batch, place.first_q, head), q.seq, rows, place.seqlen_q, HEAD_DIM, BLOCK_D, True
    )
    row_lse = load_lse(lse, place, rows)
    last = tl.minimum(first + BLOCK_M, place.seqlen_q) - 1
    blocks = blocks_seen(
        first, last, place.seqlen_k - place.seqlen_q, place.seqlen_k,
        window.left, window.right, BLOCK_N,
    )  # fmt: skip
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first_key in tl.range(blocks.begin, blocks.end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_rows(at_k, k.seq, keys, place.seqlen_k, HEAD_DIM, BLOCK_D, True)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s, _ = scores_from(qk, mods, place, window, rows[:, None], keys[None, :], True)
        gap = row_lse[:, None] - s * mods.unit
        weights = tl.exp2(-gap * LOG2E)
        total += tl.sum(tl.where(weights == 0.0, 0.0, weights * gap), 1)  # 0 · ∞ = 0
    at = head_at(entropy, batch, place.first_q, head) + rows.to(tl.int64) * entropy.seq
    tl.store(at, total, mask=rows < place.seqlen_q)


def _tile(p: AttentionProblem, *_: Tensor) -> Tile:
    return configs.attention_fwd(work_of(p.q, p.q.shape[-1], mods_of(p)), lengths_of(p).q)


@launcher(_tile, tuned=True)
def _entropy(tile: Tile, p: AttentionProblem, lse: Tensor, entropy: Tensor) -> Launch:
    lengths, (heads, head_dim) = lengths_of(p), p.q.shape[-2:]
    m_blocks = cdiv(lengths.q, tile.block_m)
    arguments = (
        heads_of(p.q, p.packed),
        heads_of(p.k, p.packed),
        rows_of(lse, p.packed),
        rows_of(entropy, p.packed),
        lengths,
        window_of(p),
        mods_of(p),
        heads,
        m_blocks,
    )
    constants = {
        "GROUP_SIZE": heads // p.k.shape[-2],
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": padded(head_dim),
        "PRECISION": precision_of(p.q.dtype),
    }
    programs = m_blocks * heads * batch_of(p)
    return Launch(attn_entropy_kernel, programs, arguments, constants, tile)


def attn_entropy(p: AttentionProblem, lse: Tensor) -> Tensor:
    entropy = torch.empty_like(lse)
    _entropy(p, lse, entropy)
    return entropy
