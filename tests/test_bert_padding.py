"""Padded batches to packed sequences and back."""

from __future__ import annotations

import torch

from fastattn.flash_attn import bert_padding, flash_attn_func, flash_attn_varlen_func

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0]])


def test_unpad_then_pad() -> None:
    x = torch.randn(4, 5, 2, 3)
    packed, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, MASK)
    assert torch.equal(packed, x[MASK.bool()])
    assert torch.equal(indices, MASK.flatten().nonzero()[:, 0])
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 3, 8, 10]
    assert longest == 5 and used.tolist() == [3, 0, 5, 2]
    padded = bert_padding.pad_input(packed, indices, 4, 5)
    assert torch.equal(padded, x * MASK[..., None, None])


def test_unused_places_are_kept_but_not_counted() -> None:
    unused = torch.zeros_like(MASK)
    unused[0, 3] = unused[1, 0] = 1
    x = torch.randn(4, 5, 2)
    packed, _, cu_seqlens, longest, used = bert_padding.unpad_input(x, MASK, unused)
    assert torch.equal(packed, x[(MASK + unused).bool()])
    assert cu_seqlens.tolist() == [0, 4, 5, 10, 12] and longest == 5
    assert used.tolist() == [3, 0, 5, 2]


def test_gradients_go_both_ways() -> None:
    x = torch.randn(4, 5, 2, requires_grad=True)
    packed, indices, *_ = bert_padding.unpad_input(x, MASK.bool())
    bert_padding.pad_input(packed * 2, indices, 4, 5).sum().backward()
    assert torch.equal(x.grad, 2.0 * MASK[..., None].expand_as(x))


def test_indices_may_be_int32() -> None:
    packed = torch.randn(2, 3)
    padded = bert_padding.pad_input(packed, torch.tensor([1, 2], dtype=torch.int32), 2, 2)
    assert torch.equal(padded.flatten(0, 1)[1:3], packed)


def test_an_empty_batch() -> None:
    packed, _, cu_seqlens, longest, _ = bert_padding.unpad_input(
        torch.randn(0, 5, 2), torch.ones(0, 5)
    )
    assert packed.shape == (0, 2) and cu_seqlens.tolist() == [0] and longest == 0


def test_padded_attention_through_packed() -> None:
    """What the functions are for: each sequence attends to its own tokens."""
    x = torch.randn(2, 6, 2, 8)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    packed, indices, offsets, longest, _ = bert_padding.unpad_input(x, mask)
    out = flash_attn_varlen_func(*3 * [packed], offsets, offsets, longest, longest, causal=True)
    padded = bert_padding.pad_input(out, indices, 2, 6)
    torch.testing.assert_close(padded[:1], flash_attn_func(*3 * [x[:1]], causal=True))
    torch.testing.assert_close(padded[1:, :4], flash_attn_func(*3 * [x[1:, :4]], causal=True))
    assert not padded[1, 4:].any()
