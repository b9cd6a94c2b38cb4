"""Blocks of the attention matrix, recomputed from lse, and a picture of them.

softmax(s) = exp(s − lse): with each row's log-sum-exp, which `attention` returns, any block of the
weights costs its own scores only. The S_q × S_k matrix never exists.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backends, nested, reference, validate
from .attention import dense_problem, packed_problem
from .autograd import transformed, wants_gradient
from .problem import AttentionProblem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Selection = int | slice | Sequence[int] | Tensor | None


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    rows: Selection = None,
    keys: Selection = None,
    heads: Selection = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """A block of the weights that `attention` with the same options gives its values.

        out, lse = attention(q, k, v, causal=True, return_lse=True)
        weights = attention_weights(q, k, lse, causal=True, rows=range(100, 110), heads=3)

    Args:
        q: (B, S_q, H_q, D); k: (B, S_k, H_k, D); lse: (B, H_q, S_q), from `attention`.
        rows: which queries; keys: which keys; heads: which query heads. An int, a slice, indices,
            or None for all.
        sinks: there so that `attention`'s options fit; lse knows them. A row's sum is then 1 less
            its sink's share.
        The other options are as in `attention`. Weights are those before dropout.

    Returns:
        (B, heads, rows, keys), fp32 (fp64 for fp64 q), differentiable. Rows that see no key are 0.
        Exact but for rounding: that of lse alone is a relative error of up to |lse| · 2⁻²⁴.

    Raises:
        As `attention`; ValueError for an lse of another shape, IndexError for a query, key or head
        that isn't there.
    """
    options = (causal, window, scale, softcap, mask, bias, alibi_slopes, sinks)
    p, lse = _problem(q, k, lse, options)
    return weights_of(p, lse, rows, keys, heads)


def attention_entropy(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    rows: Selection = None,
    heads: Selection = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    block_bytes: int = 1 << 26,
    backend: str | None = None,
) -> Tensor:
    """How spread out each query's attention is: −Σ w · log w over the keys, in nats.

    Comes from the backend's kernel, which keeps no weight. But where its gradient is wanted, or
    some `rows` only, it is plain PyTorch over blocks of rows.

    Args:
        q, k, lse: as in `attention_weights`; or packed, as in `attention_varlen`, (T_q, H_q, D),
            (T_k, H_k, D) and (H_q, T_q), with the next four; or q and k jagged, with lse packed.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in `attention_varlen`; all or
            none.
        rows: as in `attention_weights`; not of packed sequences.
        block_bytes: weights that exist at a time in the latter.
        backend: as in `attention`; not looked at by the latter.
        The others are as in `attention_weights`.

    Returns:
        (B, heads, rows), or packed (heads, T_q), fp32 (fp64 for fp64 q): 0 where one key has all
        the weight, or there is none to see; log(S_k) where all have the same.

    Raises:
        As `attention_weights` and `attention_varlen`; ValueError for `rows` of packed sequences;
        RuntimeError as `attention`, for the backend.
    """
    options = (causal, window, scale, softcap, mask, bias, alibi_slopes, sinks)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    p, lse = _of_heads(*_problem(q, k, lse, options, packing), heads)
    if p.packed and rows is not None:
        raise ValueError("rows are those of a dense call; of packed sequences, cut one out")
    plain = rows is None and not wants_gradient(p.q, p.k, p.bias, lse) and not transformed()
    if plain and lse.numel():  # kernels divide by the number of heads
        return torch.ops.fastattn.attn_entropy(*p, lse.contiguous(), backends.requested(backend))
    if not p.packed:
        return _entropy_by_blocks(p, lse, rows, block_bytes)
    validate.packed_offsets(p)
    return reference.joined_rows(
        p, lambda s: _entropy_by_blocks(s.problem, lse[None, :, s.rows], None, block_bytes)
    )


def _entropy_by_blocks(
    p: AttentionProblem, lse: Tensor, rows: Selection, block_bytes: int
) -> Tensor:
    batch, seqlen_q, heads_q, _ = p.q.shape
    every = _every(seqlen_q, _indices("rows", rows, seqlen_q, p.q.device), p.q.device)
    row_bytes = 8 * batch * heads_q * p.k.shape[1]
    entropies = []
    for block in every.split(max(1, block_bytes // max(1, row_bytes))):
        w = weights_of(p, lse, rows=block)
        log = w.clamp(min=torch.finfo(w.dtype).tiny).log()  # finite, for the gradient of w = 0
        entropies.append(-(w * log).sum(-1))
    return torch.cat(entropies, -1)


def _problem(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    options: tuple[Any, ...],
    packing: tuple[Any, ...] = (None,) * 4,
) -> tuple[AttentionProblem, Tensor]:
    """The checked problem, of no values, and lse in the accumulator's dtype."""
    packed = sum(given is not None for given in packing)
    if packed not in (0, 4):
        raise ValueError(
            "cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k go together: all or none"
        )
    if packed:
        p = packed_problem(q, k, k, *packing, *options, 0.0)
    elif isinstance(q, Tensor) and q.is_nested:
        mask, bias = options[4:6]
        p = packed_problem(*nested.pack(q, k, k, mask, bias), *options, 0.0)
    else:
        p = dense_problem(q, k, k, *options, 0.0)
    if tuple(validate.tensor("lse", lse).shape) != p.lse_shape:
        names = "(H_q, T_q)" if p.packed else "(B, H_q, S_q)"
        raise ValueError(f"lse must have shape {names} = {p.lse_shape}, got {tuple(lse.shape)}")
    validate.same_device("lse", lse, "q", p.q.device)
    return p, lse.to(validate.accumulator_dtype(p.q))


def _of_heads(
    p: AttentionProblem, lse: Tensor, heads: Selection
) -> tuple[AttentionProblem, Tensor]:
    """The scores of some query heads, each with a KV head of its own, as a problem. lse has what
    sinks did."""
    p = p._replace(v=p.k, sinks=None)
    head = _indices("heads", heads, p.q.shape[-2], p.q.device)
    if head is None:
        return p, lse
    k = p.k.index_select(-2, head // (p.q.shape[-2] // p.k.shape[-2]))
    cut = p._replace(
        q=p.q.index_select(-2, head),
        k=k,
        v=k,
        mask=_cut(p.mask, 1, head),
        bias=_cut(p.bias, 1, head),
        alibi_slopes=None if p.alibi_slopes is None else p.alibi_slopes.index_select(-1, head),
    )
    return cut, lse.index_select(-2, head)


def weights_of(
    p: AttentionProblem,
    lse: Tensor,
    rows: Selection = None,
    keys: Selection = None,
    heads: Selection = None,
) -> Tensor:
    """The block of a dense problem's undropped weights, (B, heads, rows, keys)."""
    p, lse = _of_heads(p, lse, heads)
    row = _indices("rows", rows, p.q.shape[1], p.q.device)
    s, hidden = _scores(p, row, _indices("keys", keys, p.k.shape[1], p.q.device))
    s = s if hidden is None else s.masked_fill(hidden, -torch.inf)
    lse = _take(lse, 2, row)[..., None]
    return torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0))  # −inf − (−inf) would be NaN


def whole_weights(p: AttentionProblem) -> Tensor:
    """All of a dense problem's undropped weights, which add up to 1: no rounding of lse is in them.

    The problem has no sinks. Few operators: nn.MultiheadAttention asks for these by default.
    """
    s, hidden = _scores(p, None, None)
    if p.bias is not None:
        nothing = s == -torch.inf
        hidden = nothing if hidden is None else hidden | nothing
    if hidden is None:
        return torch.softmax(s, -1)
    s = s.masked_fill(hidden, torch.finfo(s.dtype).min)  # a row of −inf would be NaN
    return torch.softmax(s, -1).masked_fill(hidden, 0.0)


def _scores(
    p: AttentionProblem, row: Tensor | None, key: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Of these queries and keys, or all: (B, H_q, rows, keys), and which of them are hidden."""
    (_, seqlen_q, heads_q, _), (_, seqlen_k, heads_k, _) = p.q.shape, p.k.shape
    block = p
    if row is not None or key is not None:
        mask, bias = (_cut(_cut(t, 2, row), 3, key) for t in (p.mask, p.bias))
        block = p._replace(mask=mask, bias=bias)
    distance = None
    if p.alibi_slopes is not None or p.window_left >= 0 or p.window_right >= 0:
        position = _every(seqlen_q, row, p.q.device, seqlen_k - seqlen_q)
        distance = _every(seqlen_k, key, p.q.device) - position[:, None]
    dtype = validate.accumulator_dtype(p.q)
    q = _take(p.q, 1, row).to(dtype).transpose(1, 2)
    k = _take(p.k, 1, key).to(dtype).permute(0, 2, 3, 1)
    if heads_q != heads_k:
        k = k.repeat_interleave(heads_q // heads_k, dim=1)
    s, _ = reference.shaped_scores(block, p.scale * (q @ k), distance)
    visible = reference.visible_keys(block, distance)
    return s, None if visible is None else ~visible


def dropped_weights(p: AttentionProblem, weights: Tensor, first_batch: int = 0) -> Tensor:
    """What multiplies the values: all of p's `weights`, dropped by its seed and scaled."""
    if p.dropout_p == 0:
        return weights
    return weights * reference.dropout_scale(p, weights, first_batch)


def _take(t: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return t if index is None else t.index_select(dim, index)


def _cut(t: Tensor | None, dim: int, index: Tensor | None) -> Tensor | None:
    """Of a mask or bias, if there is one."""
    return t if t is None or t.shape[dim] == 1 else _take(t, dim, index)


def _every(size: int, index: Tensor | None, device: torch.device, offset: int = 0) -> Tensor:
    """The indices, or all up to `size`, counted from `offset`."""
    if index is None:
        return torch.arange(offset, offset + size, device=device)
    return index + offset


def _indices(name: str, which: Selection, size: int, device: torch.device) -> Tensor | None:
    """(n,) int64 in [0, size), or None for all."""
    if which is None:
        return None
    if isinstance(which, slice):
        return torch.arange(size, device=device)[which]
    if not isinstance(which, Tensor):
        numbers = [which] if isinstance(which, int) else which
        which = torch.tensor([operator.index(i) for i in numbers], dtype=torch.int64)
    index = which.to(device).reshape(-1)
    if index.dtype == torch.bool or index.is_floating_point():
        raise TypeError(f"{name} must be an int, a slice or indices, got {index.dtype}")
    if index.numel() and not -size <= int(index.min()) <= int(index.max()) < size:
        raise IndexError(f"{name} must lie in [{-size}, {size}), got {index.tolist()}")
    return index.long() % max(size, 1)


def plot_attention(
    weights: Tensor,
    *,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 4,
) -> Figure:
    """Draws a block of attention weights, one panel a head, in the colours of one scale.

        plot_attention(attention_weights(q, k, lse, heads=[0, 5])[0]).savefig("heads.png")

    Args:
        weights: (rows, keys), or (heads, rows, keys).
        query_labels, key_labels: a name for each row and key, such as the tokens.
        titles: one a panel; its number by default.
        columns: panels side by side.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib isn't there: `pip install 'fastattn[plot]'`.
        ValueError: another shape, or labels that don't fit it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_attention needs matplotlib: pip install 'fastattn[plot]'"
        ) from error

    if validate.tensor("weights", weights).dim() not in (2, 3):
        raise ValueError(
            f"weights must be (rows, keys) or (heads, rows, keys), got {tuple(weights.shape)}"
        )
    panels = weights.detach().float().cpu().reshape(-1, *weights.shape[-2:])
    given = (
        ("query_labels", query_labels, 1),
        ("key_labels", key_labels, 2),
        ("titles", titles, 0),
    )
    for name, labels, dim in given:
        if labels is not None and len(labels) != panels.shape[dim]:
            raise ValueError(f"{len(labels)} {name} for {panels.shape[dim]}")
    columns = max(1, min(columns, len(panels)))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    top = float(panels.max()) if panels.numel() else 1.0
    for number, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        image = ax.imshow(panel.numpy(), vmin=0.0, vmax=top, cmap="viridis", aspect="auto")
        ax.set_title(f"{number}" if titles is None else titles[number])
        if query_labels is not None:
            ax.set_yticks(range(len(query_labels)), query_labels)
        if key_labels is not None:
            ax.set_xticks(range(len(key_labels)), key_labels, rotation=90)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    if len(panels):
        figure.colorbar(image, ax=axes.tolist(), label="weight")
    return figure
