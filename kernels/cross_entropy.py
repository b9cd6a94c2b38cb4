"""Cross-entropy of (N, V) logits x: loss, lse and the gradient, one program a row.

With z = x, or softcap · tanh(x / softcap),

    m = max z,  l = Σ exp(z − m),  lse = m + log l,  nll_c = log l − (z_c − m)
    loss = (1 − ε)·w_y·nll_y + ε/V·Σ_c w_c·nll_c + z_loss·lse²
    dz_c = p_c·a − [c = y]·t − s·w_c     where p_c = exp(z_c − m) / l, g = dloss of the row,
           t = g·(1 − ε)·w_y,  s = g·ε/V,  a = t + s·Σ w + 2·g·z_loss·lse + dlse

Only memory counts. A row is read once for the loss, by an online softmax of BLOCK sequences beside
each other that are merged at the end, and again for the gradient, last read first: what the L2
still holds then is read from memory only once. A saved lse can't replace the first reading: at an
offset of 2²⁴ it is rounded by 1, and exp(z − lse) wrong by a factor e.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.problem import CrossEntropyProblem, last_stride_one

from . import configs
from .configs import Tile
from .launch import Launch, launcher
from .primitives import LN2, LOG2E, tanh

LOWEST = tl.constexpr(-3.4e38)  # finite: −inf − LOWEST is no NaN


@triton.jit
def cross_entropy_kernel(
    logits,  # (N, V), rows logits_stride apart
    logits_stride,
    target,  # (N,) int64
    weight,  # (V,) fp32 or None = 1
    dloss,  # fp32, of stride 0 for one for all rows; or None, and no gradient
    dloss_stride,
    dlse,  # (N,) fp32 or None = 0
    loss,  # (N,) fp32 or None, not wanted
    lse,
    dlogits,  # (N, V), rows dlogits_stride apart; may be the logits; or None
    dlogits_stride,
    vocab,
    ignore_index,
    label_smoothing,  # None where it is 0, and so are the next two
    z_loss,
    softcap,
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    x = logits + row * logits_stride
    y = tl.load(target + row)
    ignored = y == ignore_index
    y = tl.where(ignored, 0, y)
    z_y = capped(tl.load(x + y), softcap)[0]  # before the barriers that the gradient comes behind
    w_y = 1.0
    if weight is not None:
        w_y = tl.load(weight + y)

    columns = tl.arange(0, BLOCK)
    lane_max = tl.full((BLOCK,), LOWEST, tl.float32)
    lane_sum = tl.zeros((BLOCK,), tl.float32)
    lane_smooth = tl.zeros((BLOCK,), tl.float32)  # Σ w · (z − max)
    lane_weight = tl.zeros((BLOCK,), tl.float32)  # Σ w
    for start in tl.range(0, vocab, BLOCK):
        there = start + columns < vocab
        chunk = tl.load(
            x + start + columns, mask=there, other=float("-inf"), eviction_policy="evict_last"
        )
        z = capped(chunk, softcap)[0]
        if softcap is not None:
            z = tl.where(there, z, float("-inf"))
        new_max = tl.maximum(lane_max, z)
        shift = lane_max - new_max
        lane_sum = lane_sum * tl.exp2(shift * LOG2E) + tl.exp2((z - new_max) * LOG2E)
        if label_smoothing is not None:
            w = weight_of(weight, start + columns, there)
            lane_smooth += lane_weight * shift + tl.where(there, w * (z - new_max), 0.0)
            lane_weight += w
        lane_max = new_max
    row_max = tl.max(lane_max, 0)
    row_sum = tl.sum(lane_sum * tl.exp2((lane_max - row_max) * LOG2E), 0)
    log_sum = tl.log2(row_sum) * LN2
    row_lse = row_max + log_sum

    if loss is not None:
        smooth, weights = 0.0, 0.0
        if label_smoothing is not None:
            smooth = tl.sum(lane_smooth + lane_weight * (lane_max - row_max), 0)
            weights = tl.sum(lane_weight, 0)
        value = row_loss(
            log_sum, row_max, z_y, w_y, smooth, weights, vocab, label_smoothing, z_loss
        )
        tl.store(loss + row, tl.where(ignored, 0.0, value))
    if lse is not None:
        tl.store(lse + row, row_lse)

    if dlogits is not None:
        g = tl.load(dloss + row * dloss_stride)
        t, s = g * w_y, 0.0
        a = t
        if label_smoothing is not None:
            t, s = t * (1.0 - label_smoothing), g * label_smoothing / vocab
            a = t + s * tl.sum(lane_weight, 0)
            s = tl.where(ignored, 0.0, s)
        if z_loss is not None:
            a += 2.0 * g * z_loss * row_lse
        t, a = tl.where(ignored, 0.0, t), tl.where(ignored, 0.0, a)
        silent = ignored  # a gradient of 0 even of NaN
        if dlse is not None:
            a += tl.load(dlse + row)
            silent = tl.full((), False, tl.int1)
        a = a / row_sum
        dx = dlogits + row * dlogits_stride
        blocks = tl.cdiv(vocab, BLOCK)
        for i in tl.range(0, blocks):
            column = (blocks - 1 - i) * BLOCK + columns
            there = column < vocab
            z, slope = capped(
                tl.load(x + column, mask=there, other=0.0, eviction_policy="evict_first"), softcap
            )
            dz = tl.exp2((z - row_max) * LOG2E) * a - tl.where(column == y, t, 0.0)
            if label_smoothing is not None:
                dz -= s * weight_of(weight, column, there)
            dz = tl.where(silent, 0.0, dz * slope)
            tl.store(dx + column, dz.to(dlogits.dtype.element_ty), mask=there)


@triton.jit
def row_loss(log_sum, row_max, z_y, w_y, smooth, weights, vocab, label_smoothing, z_loss):
    """The loss of a target that isn't ignored; smooth is Σ w · (z − max), weights are Σ w."""
    loss = w_y * (log_sum - (z_y - row_max))
    if label_smoothing is not None:
        smoothed = label_smoothing / vocab * (weights * log_sum - smooth)
        loss = (1.0 - label_smoothing) * loss + smoothed
    if z_loss is not None:
        loss += z_loss * (row_max + log_sum) * (row_max + log_sum)
    return loss


@triton.jit
def capped(x, softcap):
    """(z, its derivative by x) in fp32."""
    x = x.to(tl.float32)
    if softcap is None:
        return x, 1.0
    else:
        t = tanh(x / softcap)
        return softcap * t, 1.0 - t * t


@triton.jit
def weight_of(weight, columns, there):
    if weight is None:
        return there.to(tl.float32)
    else:
        return tl.load(weight + columns, mask=there, other=0.0)


# --- launches -------------------------------------------------------------------------------------


def _tile(p: CrossEntropyProblem, *_: Tensor | None) -> Tile:
    return configs.cross_entropy(p.logits.shape[1], p.label_smoothing > 0)


@launcher(_tile)
def _launch(
    tile: Tile,
    p: CrossEntropyProblem,
    dloss: Tensor | None,
    dlse: Tensor | None,
    loss: Tensor | None,
    lse: Tensor | None,
    dlogits: Tensor | None,
) -> Launch:
    rows, vocab = p.logits.shape
    arguments = (
        p.logits,
        p.logits.stride(0),
        p.target,
        p.weight,
        dloss,
        0 if dloss is None or dloss.dim() == 0 else dloss.stride(0),
        dlse,
        loss,
        lse,
        dlogits,
        0 if dlogits is None else dlogits.stride(0),
        vocab,
        p.ignore_index,
        p.label_smoothing or None,
        p.z_loss or None,
        p.softcap or None,
    )
    return Launch(cross_entropy_kernel, rows, arguments, {"BLOCK": tile.block_n}, tile)


def cross_entropy_fwd(
    p: CrossEntropyProblem, dloss: Tensor | None, dlogits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and lse a row; with dlogits (may be the logits) dloss · ∂loss too."""
    loss = p.logits.new_empty(p.logits.shape[:1], dtype=torch.float32)
    lse = torch.empty_like(loss)
    _launch(p, dloss, None, loss, lse, dlogits)
    return loss, lse


def cross_entropy_bwd(
    p: CrossEntropyProblem, dloss: Tensor, dlse: Tensor | None, dlogits: Tensor | None
) -> Tensor:
    """dloss · ∂loss + dlse · ∂lse, in dlogits (may be the logits) if given."""
    if dlogits is None:
        dlogits = p.logits.new_empty(p.logits.shape)
    dlse = None if dlse is None else last_stride_one(dlse)
    _launch(p, dloss, dlse, None, None, dlogits)
    return dlogits
