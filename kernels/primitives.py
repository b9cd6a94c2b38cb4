"""What the attention kernels share: which keys a query sees, scores, softmax, dropout, tiles.

Scores are kept divided by `unit`. Plain ones are the products q · k as they come, and scale their
unit: a weight is then one subtraction, one multiplication and one exp2. All others have unit 1.

A score's query is an index `rows` and its key an index `keys`, of shapes that broadcast to the
tile: (BLOCK_M, 1) and (1, BLOCK_N), or (1, BLOCK_M) and (BLOCK_N, 1) where it is transposed.

What a problem hasn't got is None, and a branch on it is taken when the kernel is compiled.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Heads(NamedTuple):
    """A tensor of rows by batch entry, position and head; of stride 1 along a row."""

    data: Any
    batch: Any  # strides, in elements
    seq: Any
    head: Any


class Scores(NamedTuple):
    """A mask, a bias or its gradient: a tensor that broadcasts to (B, H_q, S_q, S_k)."""

    data: Any
    batch: Any  # strides, in elements
    head: Any
    row: Any
    key: Any


class Lengths(NamedTuple):
    """Of all sequences, or the longest and (B + 1,) int32 offsets of packed ones."""

    q: Any
    k: Any
    offsets_q: Any
    offsets_k: Any


class Window(NamedTuple):
    left: Any  # keys seen left of the diagonal and right of it; None = all
    right: Any


class ScoreMods(NamedTuple):
    """From the product q · k to a score, and to whether its weight is dropped.

    Kernels begin by making it anew: that of their arguments has a type in which Triton 3.6.0 takes
    the strides of a mask or a bias that are 1 for None, behind the next branch or loop.
    """

    unit: Any  # of scores
    scale: Any  # of products; None if it is the unit, scale / softcap if there is one
    softcap: Any
    mask: Any  # Scores of bool
    bias: Any  # Scores
    alibi_slopes: Any  # (B, H_q) fp32, of batch stride alibi_stride
    alibi_stride: Any
    seed: Any  # () int64
    threshold: Any  # a weight is kept if its random word is at least this
    keep_scale: Any  # 1 / (1 − dropout_p)


class Place(NamedTuple):
    """One head of one sequence: where it lies, and how long it is."""

    batch: Any  # the sequence's number
    head: Any  # the query head
    first_q: Any  # rows before it in a packed tensor
    first_k: Any
    seqlen_q: Any
    seqlen_k: Any


@triton.jit
def place_of(lengths, batch, head):
    if lengths.offsets_q is None:
        return Place(batch, head, 0, 0, lengths.q, lengths.k)
    else:
        first_q = tl.load(lengths.offsets_q + batch)
        first_k = tl.load(lengths.offsets_k + batch)
        seqlen_q = tl.load(lengths.offsets_q + batch + 1) - first_q
        seqlen_k = tl.load(lengths.offsets_k + batch + 1) - first_k
        return Place(batch, head, first_q, first_k, seqlen_q, seqlen_k)


# --- tiles ----------------------------------------------------------------------------------------


@triton.jit
def head_at(x, batch, first, head):
    """Where row `first` of a head of `x` lies."""
    b, s, h = tl.cast(batch, tl.int64), tl.cast(first, tl.int64), tl.cast(head, tl.int64)
    return x.data + b * x.batch + s * x.seq + h * x.head


@triton.jit
def load_at(x, offsets, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """The tile (rows, BLOCK) of rows of WIDTH elements at x + offsets; 0 beyond them, and in rows
    that are not there if CHECK."""
    columns = tl.arange(0, BLOCK)
    at = x + offsets[:, None] + columns[None, :]
    if CHECK and WIDTH < BLOCK:
        return tl.load(at, mask=there[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif CHECK:
        return tl.load(at, mask=there[:, None], other=0.0)
    elif WIDTH < BLOCK:
        return tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_rows(x, stride, rows, end, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """`load_at` of rows `stride` apart, which are there before row `end`."""
    return load_at(x, rows.to(tl.int64) * stride, rows < end, WIDTH, BLOCK, CHECK)


@triton.jit
def store_at(x, offsets, there, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = there[:, None] & (columns < WIDTH)[None, :]
    tl.store(x + offsets[:, None] + columns[None, :], tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def store_rows(x, stride, rows, end, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    store_at(x, rows.to(tl.int64) * stride, rows < end, tile, WIDTH, BLOCK)


@triton.jit
def at_scores(x, place, rows, keys):
    """Pointers to the elements of rows × keys."""
    b, h = tl.cast(place.batch, tl.int64), tl.cast(place.head, tl.int64)
    return x.data + b * x.batch + h * x.head + rows.to(tl.int64) * x.row + keys.to(tl.int64) * x.key


# --- which keys a query sees ----------------------------------------------------------------------


@triton.jit
def inside(place, window, rows, keys):
    """Whether a pair lies in the sequence and in the window; the mask apart."""
    diagonal = place.seqlen_k - place.seqlen_q
    seen = (rows < place.seqlen_q) & (keys < place.seqlen_k)
    if window.left is not None:
        seen &= keys >= rows + diagonal - window.left
    if window.right is not None:
        seen &= keys <= rows + diagonal + window.right
    return seen


class Blocks(NamedTuple):
    """Where blocks begin and end; those from inner_begin to inner_end need no check. One loop goes
    over them, and one over what is left and right of them, at the edges."""

    begin: Any
    inner_begin: Any
    inner_end: Any
    end: Any


@triton.jit
def blocks_seen(first, last, diagonal, seqlen, left, right, BLOCK: tl.constexpr):
    """The blocks of keys that queries first ≤ i ≤ last see: those of some i + diagonal − left ≤ j
    ≤ i + diagonal + right, j < seqlen."""
    begin, inner_begin, end, inner_end = 0, 0, seqlen, seqlen
    if left is not None:
        begin = tl.maximum(first + diagonal - left, 0)
        inner_begin = tl.maximum(last + diagonal - left, 0)
    if right is not None:
        end = tl.minimum(tl.maximum(last + diagonal + right + 1, 0), seqlen)
        inner_end = tl.minimum(tl.maximum(first + diagonal + right + 1, 0), seqlen)
    begin = begin // BLOCK * BLOCK
    end = tl.maximum(end, begin)
    inner_begin = tl.minimum((inner_begin + BLOCK - 1) // BLOCK * BLOCK, end)
    inner_end = tl.maximum(inner_end // BLOCK * BLOCK, inner_begin)
    return Blocks(begin, inner_begin, inner_end, end)


@triton.jit
def all_edges(blocks):
    """One loop then goes over all of them. Dropout wants that: its random numbers cost far more
    than the checks, and a second copy of them doubles the time to compile, and spills."""
    return Blocks(blocks.begin, blocks.begin, blocks.begin, blocks.end)


@triton.jit
def count_of(blocks, left, EDGES: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks are at the edges, or between them; `left` as in blocks_seen."""
    if not EDGES:
        return (blocks.inner_end - blocks.inner_begin) // BLOCK
    elif left is None:
        return tl.cdiv(blocks.end - blocks.inner_end, BLOCK)
    else:
        left_edge = tl.cdiv(blocks.inner_begin - blocks.begin, BLOCK)
        return left_edge + tl.cdiv(blocks.end - blocks.inner_end, BLOCK)


@triton.jit
def block_at(blocks, left, i, EDGES: tl.constexpr, BLOCK: tl.constexpr):
    """Where the i-th of them begins."""
    if not EDGES:
        return blocks.inner_begin + i * BLOCK
    elif left is None:
        return blocks.inner_end + i * BLOCK
    else:
        at = blocks.begin + i * BLOCK
        return tl.where(at < blocks.inner_begin, at, at - blocks.inner_begin + blocks.inner_end)


# --- scores ---------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Within 3e-7 relative. Up to 0.8, where the other formula would cancel, an odd polynomial."""
    u = x * x
    near = 1.5847563e-3 * u - 7.4095576e-3
    near = near * u + 2.1302991e-2
    near = near * u - 5.3852331e-2
    near = near * u + 1.3332221e-1
    near = near * u - 3.3333299e-1
    far = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    return tl.where(u <= 0.64, near * u * x + x, far)


@triton.jit
def scores_from(qk, mods, place, window, rows, keys, CHECK: tl.constexpr):
    """(scores, slope) of products qk: −inf where hidden, whose place in the window is looked at if
    CHECK; slope is the derivative of softcap."""
    s, slope = qk, 1.0
    if mods.scale is not None:
        s = qk * mods.scale
    if mods.softcap is not None:
        t = tanh(s)
        s, slope = mods.softcap * t, 1.0 - t * t
    if mods.bias is not None:
        there = (rows < place.seqlen_q) & (keys < place.seqlen_k)
        bias = tl.load(at_scores(mods.bias, place, rows, keys), mask=there, other=0.0)
        s += bias.to(tl.float32)
    if mods.alibi_slopes is not None:
        at = tl.cast(place.batch, tl.int64) * mods.alibi_stride + place.head
        steepness = tl.load(mods.alibi_slopes + at)
        distance = rows + (place.seqlen_k - place.seqlen_q) - keys
        s -= steepness * tl.abs(distance).to(tl.float32)
    if mods.mask is not None:
        there = (rows < place.seqlen_q) & (keys < place.seqlen_k)
        seen = tl.load(at_scores(mods.mask, place, rows, keys), mask=there, other=False)
        s = tl.where(seen, s, float("-inf"))
    if CHECK:
        s = tl.where(inside(place, window, rows, keys), s, float("-inf"))
    return s, slope


@triton.jit
def kept(mods, place, rows, first_key, BLOCK: tl.constexpr):
    """Dropout's mask (rows, BLOCK), of BLOCK keys from a multiple of 4 on.

    Philox4x32-10 (Salmon et al., SC 2011) with the seed as key; key j takes word j % 4 of counter
    (j // 4, i, h, b).
    """
    zero = tl.zeros((rows.shape[0], BLOCK // 4), tl.int32)
    quads = first_key // 4 + tl.arange(0, BLOCK // 4)[None, :] + zero
    w0, w1, w2, w3 = tl.philox(
        tl.load(mods.seed), quads, rows[:, None] + zero, place.head + zero, place.batch + zero
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (…, 2, 2), flattened w0 w1 w2 w3
    words = tl.reshape(words, (rows.shape[0], BLOCK))
    return words.to(tl.int64) >= mods.threshold


# --- softmax --------------------------------------------------------------------------------------


@triton.jit
def online_softmax(s, unit, row_max, row_sum):
    """(weights exp(s − row_max), what sums so far are multiplied by, row_max, row_sum).

    A row of nothing but −inf so far has row_max −inf, which is not subtracted: it would give NaN.
    """
    new_max = tl.maximum(row_max, tl.max(s, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2((s - shift[:, None]) * (unit * LOG2E))
    row_scale = tl.exp2((row_max - shift) * (unit * LOG2E))
    return weights, row_scale, new_max, row_sum * row_scale + tl.sum(weights, 1)


@triton.jit
def add_key(acc, q_tile, k_row, v_row, row_lse, mods, place, window, rows, key):
    """acc + weights · v_row of one key, of queries in fp32 whose lse is known: what the slow repair
    of a tile adds, so that no hidden key's NaN gets in."""
    qk = tl.sum(q_tile * k_row.to(tl.float32)[None, :], 1)[:, None]
    s, _ = scores_from(
        qk, mods, place, window, rows[:, None], key + tl.zeros((1, 1), tl.int32), True
    )
    weights = tl.exp2((s * mods.unit - row_lse[:, None]) * LOG2E)
    if mods.seed is not None:
        keep = kept(mods, place, rows, key // 4 * 4, 4) & (tl.arange(0, 4) == key % 4)[None, :]
        keep = tl.max(keep.to(tl.int32), 1)[:, None] > 0
        weights = tl.where(keep, weights * mods.keep_scale, 0.0)
    return acc + tl.where(s == float("-inf"), 0.0, weights * v_row.to(tl.float32)[None, :])


@triton.jit
def is_spoiled(acc, row_lse):
    """Whether a tile has NaN in a row whose lse is a number: a hidden key's, as 0 · NaN. By one
    reduction: on one after the other Triton 3.6 and 3.7 fail for sm_100."""
    spoiled = (acc != acc) & (row_lse == row_lse)[:, None]
    return tl.max(spoiled.to(tl.int32)) > 0


@triton.jit
def add_sink(sink, unit, row_max, row_sum):
    """(what sums so far are multiplied by, row_max, row_sum) with one more score, of no value."""
    sink = sink / unit
    new_max = tl.maximum(row_max, sink)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    row_scale = tl.exp2((row_max - shift) * (unit * LOG2E))
    return row_scale, new_max, row_sum * row_scale + tl.exp2((sink - shift) * (unit * LOG2E))


@triton.jit
def natural_lse(unit, row_max, row_sum):
    """−inf for a row that saw no key."""
    lse = row_max * unit + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)) * LN2
    return tl.where(row_sum == 0.0, float("-inf"), lse)


@triton.jit
def load_lse(lse, place, rows):
    """+inf where a row saw no key, so that its weights are 0."""
    at = head_at(lse, place.batch, place.first_q, place.head) + rows.to(tl.int64) * lse.seq
    row_lse = tl.load(at, mask=rows < place.seqlen_q, other=float("inf"))
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse)
