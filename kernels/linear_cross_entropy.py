"""Loss and lse of logits z = x·Wᵀ + b that never reach memory: for evaluation, and as the forward
pass where the backward recomputes the logits. Formulas as in cross_entropy.py.

A program keeps BLOCK_M rows of x and goes over its split of the vocabulary, BLOCK_N classes at a
time, with an online softmax (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
2024). Programs beside each other have different rows and the same classes, whose weights they read
from the L2. A second kernel merges the splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.problem import LinearCrossEntropyProblem, last_stride_one

from . import configs
from .arguments import precision_of
from .configs import Tile, cdiv
from .cross_entropy import LOWEST, capped, row_loss, weight_of
from .launch import Launch, launcher
from .primitives import LN2, LOG2E

# Of a row over the classes of a split: max z, Σ exp(z − max), the target's z or 0, and if labels
# are smoothed Σ w · (z − max) and Σ w.
PARTIALS = 5


@triton.jit
def linear_cross_entropy_kernel(
    x,  # (N, C), rows x_stride apart
    x_stride,
    linear_weight,  # (V, C), rows w_stride apart
    w_stride,
    linear_bias,  # (V,) or None
    target,  # (N,) int64
    weight,  # (V,) fp32 or None = 1
    partials,  # (PARTIALS, splits, N) fp32
    rows_count,  # N
    channels,
    vocab,
    share,  # classes of a split, a multiple of BLOCK_N
    m_blocks,
    splits,  # the grid is (m_blocks · splits,)
    softcap,  # or None
    SMOOTHED: tl.constexpr,
    EVEN: tl.constexpr,  # channels are a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    split = program // m_blocks
    rows = program % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < rows_count
    y = tl.load(target + rows, mask=there, other=-1)
    at_x = x + tl.where(there, rows, 0).to(tl.int64)[:, None] * x_stride
    begin = split * share
    end = tl.minimum(begin + share, vocab)

    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    label = tl.zeros((BLOCK_M,), tl.float32)
    smooth = tl.zeros((BLOCK_M,), tl.float32)
    weights = 0.0
    for first in tl.range(begin, end, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        inside = columns < end
        at_w = linear_weight + tl.where(inside, columns, begin).to(tl.int64)[None, :] * w_stride
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, channels, BLOCK_K):
            c = k + tl.arange(0, BLOCK_K)
            if EVEN:
                x_tile, w_tile = tl.load(at_x + c[None, :]), tl.load(at_w + c[:, None])
            else:
                x_tile = tl.load(at_x + c[None, :], mask=(c < channels)[None, :], other=0.0)
                w_tile = tl.load(at_w + c[:, None], mask=(c < channels)[:, None], other=0.0)
            z = tl.dot(x_tile, w_tile, z, input_precision=PRECISION)
        if linear_bias is not None:
            bias = tl.load(linear_bias + columns, mask=inside, other=0.0)
            z += bias.to(tl.float32)[None, :]
        z = tl.where(inside[None, :], capped(z, softcap)[0], float("-inf"))
        label += tl.sum(tl.where(columns[None, :] == y[:, None], z, 0.0), 1)
        new_max = tl.maximum(row_max, tl.max(z, 1))
        shift = row_max - new_max
        row_sum = row_sum * tl.exp2(shift * LOG2E)
        row_sum += tl.sum(tl.exp2((z - new_max[:, None]) * LOG2E), 1)
        if SMOOTHED:
            w = weight_of(weight, columns, inside)
            difference = tl.where(inside[None, :], z - new_max[:, None], 0.0)
            smooth += weights * shift + tl.sum(w[None, :] * difference, 1)
            weights += tl.sum(w, 0)
        row_max = new_max

    one = tl.cast(splits, tl.int64) * rows_count  # of the partials
    at = partials + tl.cast(split, tl.int64) * rows_count + rows
    tl.store(at, row_max, mask=there)
    tl.store(at + one, row_sum, mask=there)
    tl.store(at + 2 * one, label, mask=there)
    if SMOOTHED:
        tl.store(at + 3 * one, smooth, mask=there)
        tl.store(at + 4 * one, weights + tl.zeros((BLOCK_M,), tl.float32), mask=there)


@triton.jit
def linear_cross_entropy_merge_kernel(
    partials,  # (PARTIALS, splits, N) fp32
    target,
    weight,
    loss,  # (N,) fp32
    lse,
    rows_count,
    vocab,
    splits,
    ignore_index,
    label_smoothing,  # None where it is 0, and so is the next
    z_loss,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < rows_count
    one = tl.cast(splits, tl.int64) * rows_count
    row_max = tl.full((BLOCK,), LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK,), tl.float32)
    label = tl.zeros((BLOCK,), tl.float32)
    smooth = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for split in tl.range(0, splits):
        at = partials + tl.cast(split, tl.int64) * rows_count + rows
        split_max = tl.load(at, mask=there, other=0.0)
        split_sum = tl.load(at + one, mask=there, other=1.0)
        label += tl.load(at + 2 * one, mask=there, other=0.0)
        new_max = tl.maximum(row_max, split_max)
        row_sum = row_sum * tl.exp2((row_max - new_max) * LOG2E)
        row_sum += split_sum * tl.exp2((split_max - new_max) * LOG2E)
        if label_smoothing is not None:
            split_weights = tl.load(at + 4 * one, mask=there, other=0.0)
            smooth += weights * (row_max - new_max) + split_weights * (split_max - new_max)
            smooth += tl.load(at + 3 * one, mask=there, other=0.0)
            weights += split_weights
        row_max = new_max
    log_sum = tl.log2(row_sum) * LN2
    y = tl.load(target + rows, mask=there, other=ignore_index)
    ignored = y == ignore_index
    w_y = 1.0
    if weight is not None:
        w_y = tl.load(weight + tl.where(ignored, 0, y))
    value = row_loss(
        log_sum, row_max, label, w_y, smooth, weights, vocab, label_smoothing, z_loss
    )  # fmt: skip
    tl.store(loss + rows, tl.where(ignored, 0.0, value), mask=there)
    tl.store(lse + rows, row_max + log_sum, mask=there)


# --- launches -------------------------------------------------------------------------------------


def _tile(p: LinearCrossEntropyProblem, *_: Tensor) -> Tile:
    return configs.linear_cross_entropy(p.x.dtype, p.label_smoothing > 0 or p.softcap > 0)


@launcher(_tile, tuned=True)
def _fwd(tile: Tile, p: LinearCrossEntropyProblem, partials: Tensor) -> Launch:
    (rows, channels), vocab, splits = p.x.shape, p.linear_weight.shape[0], partials.shape[1]
    m_blocks = cdiv(rows, tile.block_m)
    arguments = (
        p.x,
        p.x.stride(0),
        p.linear_weight,
        p.linear_weight.stride(0),
        p.linear_bias,
        p.target,
        p.weight,
        partials,
        rows,
        channels,
        vocab,
        cdiv(cdiv(vocab, tile.block_n), splits) * tile.block_n,
        m_blocks,
        splits,
        p.softcap or None,
    )
    block_k = configs.channels_at_a_time(p.x.dtype)
    constants = {
        "SMOOTHED": p.label_smoothing > 0,
        "EVEN": channels % block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block_k,
        "PRECISION": precision_of(p.x.dtype),
    }
    return Launch(linear_cross_entropy_kernel, m_blocks * splits, arguments, constants, tile)


@launcher(lambda *_: configs.ROWS)
def _merge(
    tile: Tile, p: LinearCrossEntropyProblem, partials: Tensor, loss: Tensor, lse: Tensor
) -> Launch:
    _, splits, rows = partials.shape
    arguments = (
        partials,
        p.target,
        p.weight,
        loss,
        lse,
        rows,
        p.linear_weight.shape[0],
        splits,
        p.ignore_index,
        p.label_smoothing or None,
        p.z_loss or None,
    )
    programs, constants = cdiv(rows, tile.block_m), {"BLOCK": tile.block_m}
    return Launch(linear_cross_entropy_merge_kernel, programs, arguments, constants, tile)


def linear_cross_entropy_fwd(p: LinearCrossEntropyProblem) -> tuple[Tensor, Tensor]:
    """(loss, lse), both (N,) fp32. 20 bytes a row and split are all that it needs besides."""
    rows, vocab, tile = p.x.shape[0], p.linear_weight.shape[0], _tile(p)
    p = p._replace(x=last_stride_one(p.x), linear_weight=last_stride_one(p.linear_weight))
    splits = configs.splits(max(cdiv(rows, tile.block_m), 1), cdiv(vocab, tile.block_n))
    partials = p.x.new_empty((PARTIALS, splits, rows), dtype=torch.float32)
    loss, lse = p.x.new_empty((2, rows), dtype=torch.float32)
    _fwd(p, partials)
    _merge(p, partials, loss, lse)
    return loss, lse
