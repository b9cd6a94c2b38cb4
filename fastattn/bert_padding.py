"""From padded batches to packed sequences and back: flash_attn.bert_padding's functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a mask selects, packed.

    Args:
        hidden_states: (B, S, …).
        attention_mask: (B, S), bool or int, 1 = a token, 0 = padding.
        unused_mask: (B, S), likewise: 1 = a place that is kept, though no token is in it.

    Returns:
        packed (T, …); indices (T,) of its tokens in the flattened (B·S, …); cu_seqlens (B + 1,)
        int32; the longest sequence's length; and tokens a sequence, (B,) int32, which unused places
        don't count among. Waits for the device.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        cu_seqlens,
        longest,
        used,
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(T, …) back to (B, S, …), 0 where `indices`, from `unpad_input`, have no token."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """x[indices], differentiable."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, …) with `values` at `indices`, differentiable."""
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_copy(0, indices.long(), values)
