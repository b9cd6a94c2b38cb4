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

from . import reference, validate
from .attention import dense_problem
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
    options = (causal, window, scale, softcap, mask, bias, alibi_slopes, sinks, 0.0)
    p = dense_problem(q, k, k, *options)
    want = (p.q.shape[0], p.q.shape[2], p.q.shape[1])
    if tuple(validate.tensor("lse", lse).shape) != want:
        raise ValueError(f"lse must have shape (B, H_q, S_q) = {want}, got {tuple(lse.shape)}")
    return weights_of(p, lse, rows, keys, heads)


def attention_entropy(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    rows: Selection = None,
    heads: Selection = None,
    block_bytes: int = 1 << 26,
    **options: Any,
) -> Tensor:
    """How spread out each query's attention is: −Σ w · log w over the keys, in nats.

    Args:
        q, k, lse, rows, heads, options: as in `attention_weights`.
        block_bytes: weights that exist at a time: rows are gone through in blocks of that size.

    Returns:
        (B, heads, rows), fp32 (fp64 for fp64 q): 0 where one key has all the weight, or there is
        none to see; log(S_k) where all have the same.

    Raises:
        As `attention_weights`.
    """
    validate.tensor("q", q, 4)
    every = _every(q.shape[1], _indices("rows", rows, q.shape[1], q.device), q.device)
    row_bytes = 8 * q.shape[0] * q.shape[2] * validate.tensor("k", k, 4).shape[1]
    entropies = []
    for block in every.split(max(1, block_bytes // max(1, row_bytes))):
        w = attention_weights(q, k, lse, rows=block, heads=heads, **options)
        entropies.append(-torch.xlogy(w, w).sum(-1))
    return torch.cat(entropies, -1)


def weights_of(
    p: AttentionProblem,
    lse: Tensor,
    rows: Selection = None,
    keys: Selection = None,
    heads: Selection = None,
) -> Tensor:
    """The block of a dense problem's undropped weights, (B, heads, rows, keys)."""
    (_, seqlen_q, heads_q, _), (_, seqlen_k, heads_k, _) = p.q.shape, p.k.shape
    row = _indices("rows", rows, seqlen_q, p.q.device)
    key = _indices("keys", keys, seqlen_k, p.q.device)
    head = _indices("heads", heads, heads_q, p.q.device)
    kv_head = head
    if heads_q != heads_k:
        kv_head = _every(heads_q, head, p.q.device) // (heads_q // heads_k)

    def cut(t: Tensor | None) -> Tensor | None:
        """Of what broadcasts to (B, H_q, S_q, S_k)."""
        for dim, index in ((1, head), (2, row), (3, key)):
            if t is not None and t.shape[dim] > 1:
                t = _take(t, dim, index)
        return t

    slopes = p.alibi_slopes if p.alibi_slopes is None else _take(p.alibi_slopes, -1, head)
    block = p._replace(mask=cut(p.mask), bias=cut(p.bias), alibi_slopes=slopes)
    distance = None
    if slopes is not None or p.window_left >= 0 or p.window_right >= 0:
        position = _every(seqlen_q, row, p.q.device)[:, None] + seqlen_k - seqlen_q
        distance = _every(seqlen_k, key, p.q.device) - position
    dtype = validate.accumulator_dtype(p.q)
    q = _take(_take(p.q, 1, row), 2, head).to(dtype).transpose(1, 2)
    k = _take(_take(p.k, 1, key), 2, kv_head).to(dtype).transpose(1, 2)
    s, _ = reference.shaped_scores(block, p.scale * (q @ k.mT), distance)
    if (visible := reference.visible_keys(block, distance)) is not None:
        s = s.masked_fill(~visible, -torch.inf)
    lse = _take(_take(lse, 1, head), 2, row)[..., None]
    return torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0))  # −inf − (−inf) would be NaN


def dropped_weights(p: AttentionProblem, weights: Tensor, first_batch: int = 0) -> Tensor:
    """What multiplies the values: all of p's `weights`, dropped by its seed and scaled."""
    if p.dropout_p == 0:
        return weights
    return weights * reference.dropout_scale(p, weights, first_batch)


def _take(t: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return t if index is None else t.index_select(dim, index)


def _every(size: int, index: Tensor | None, device: torch.device) -> Tensor:
    return torch.arange(size, device=device) if index is None else index


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
