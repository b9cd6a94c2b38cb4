"""Philox against its published vectors, and the dropout mask against integers of Python."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastattn import philox

# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 on Python's unbounded integers."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = y >> 32 ^ b ^ k0, y % 2**32, x >> 32 ^ d ^ k1, x % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    got = philox.philox4x32(tuple(torch.tensor(w) for w in words(counter)), words(key))
    assert tuple(int(word) for word in got) == words(result)
    assert philox_by_hand(words(counter), words(key)) == words(result)


@pytest.mark.parametrize("seed", [0, 1, 0x0123_4567_89AB_CDEF, -2, -(2**63)])
def test_keep_mask_is_the_documented_counter_and_word(seed: int) -> None:
    batch, heads, seqlen_q, seqlen_k, first_batch, p = 2, 3, 4, 7, 5, 0.4
    mask = philox.keep_mask(
        torch.tensor(seed), p, batch, heads, seqlen_q, seqlen_k, first_batch=first_batch
    )
    assert mask.shape == (batch, heads, seqlen_q, seqlen_k) and mask.dtype == torch.bool
    key = seed % 2**32, (seed >> 32) % 2**32
    for b, h, i, j in itertools.product(*map(range, mask.shape)):
        word = philox_by_hand((j // 4, i, h, b + first_batch), key)[j % 4]
        assert bool(mask[b, h, i, j]) == (word >= round(p * 2**32))


def test_keep_mask_does_not_depend_on_the_shape_around_it() -> None:
    whole = philox.keep_mask(7, 0.5, 3, 4, 9, 13)
    assert torch.equal(philox.keep_mask(7, 0.5, 2, 3, 5, 6), whole[:2, :3, :5, :6])
    assert torch.equal(philox.keep_mask(7, 0.5, 1, 4, 9, 13, first_batch=2), whole[2:])
    assert philox.keep_mask(7, 0.5, 2, 2, 3, 0).shape == (2, 2, 3, 0)


def test_seed_may_be_a_tensor_or_a_number() -> None:
    assert torch.equal(
        philox.keep_mask(99, 0.5, 1, 2, 8, 8), philox.keep_mask(torch.tensor(99), 0.5, 1, 2, 8, 8)
    )
    assert not torch.equal(
        philox.keep_mask(1, 0.5, 1, 2, 8, 8), philox.keep_mask(1 << 32, 0.5, 1, 2, 8, 8)
    )


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_share_of_kept_weights(p: float) -> None:
    mask = philox.keep_mask(3, p, 2, 4, 128, 128)
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - (1 - p)) <= 4 * deviation


def test_thresholds() -> None:
    assert philox.keep_threshold(0.0) == 0
    assert philox.keep_threshold(0.5) == 2**31
    assert philox.keep_threshold(1.0) == 2**32  # above every word: nothing is kept
    assert not philox.keep_mask(3, 1.0, 1, 2, 16, 16).any()
