"""Philox4x32-10 in PyTorch integer arithmetic: the random numbers of dropout on every backend.

A counter-based generator: ten rounds of multiply and xor turn a 128-bit counter and a 64-bit key
into four 32-bit words. A kernel can therefore make the mask of any tile, in any order, and make it
again in its backward, without storing it.
Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and √3 − 1, added to the key after each round
WORD_MASK = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of x · multiplier: in halves of x, as int64 cannot hold the product."""
    low = (x & 0xFFFF) * multiplier
    high = (x >> 16) * multiplier + (low >> 16)  # ⌊x · multiplier / 2¹⁶⌋ < 2⁴⁸
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox4x32(counter: Words, key: tuple[Tensor | int, Tensor | int]) -> Words:
    """Four random words a counter; words are int64 tensors of values below 2³², and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD_MASK, (k1 + KEY_STEPS[1]) & WORD_MASK
    return c0, c1, c2, c3


def keep_threshold(dropout_p: float) -> int:
    """A weight is kept if its random word is at least this: round(p · 2³²), half to even."""
    return round(dropout_p * 2**32)


def keep_mask(
    seed: Tensor | int,
    dropout_p: float,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device | str | None = None,
    first_batch: int = 0,
) -> Tensor:
    """The dropout mask of attention weights: bool (batch, heads, seqlen_q, seqlen_k), True = kept.

    The key is the 64-bit `seed` (low word, high word), the counter of weight (b, h, i, j) is
    (j // 4, i, h, b), and word j % 4 of the result decides. `heads` are query heads; b starts at
    `first_batch`; in a packed problem b is the sequence's number and i, j count within it.
    """

    def axis(size: int, dim: int, first: int = 0) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = size
        return torch.arange(first, first + size, device=device).view(shape)

    if isinstance(seed, Tensor):
        seed = seed.to(device)
    key = seed & WORD_MASK, seed >> 32 & WORD_MASK
    quads = -(-seqlen_k // 4)
    counter = axis(quads, 3), axis(seqlen_q, 2), axis(heads, 1), axis(batch, 0, first_batch)
    words = torch.stack(philox4x32(counter, key), dim=-1)  # (batch, heads, seqlen_q, quads, 4)
    return (words >= keep_threshold(dropout_p)).flatten(3)[..., :seqlen_k]
