"""Every barrier, wait and fence of the CUDA kernels is needed, and the emulator misses it.

A kernel runs in the emulator once to list the lines of those it passes, then without each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import emulated
import pytest
import torch
from emulator.runtime import Library

import fastattn

SEQLEN_Q, SEQLEN_K = 70, 150  # several tiles of keys; the last ones are not full


def attention(dtype: torch.dtype) -> None:
    q = torch.randn(1, SEQLEN_Q, 2, 64).to(dtype)
    k, v = torch.randn(2, 1, SEQLEN_K, 2, 64).to(dtype).unbind()
    fastattn.attention(q, k, v, causal=True, backend="cuda")


def attention_and_gradients(dtype: torch.dtype) -> None:
    q = torch.randn(1, SEQLEN_Q, 2, 64).to(dtype).requires_grad_()
    k, v = torch.randn(2, 1, SEQLEN_K, 2, 64).to(dtype).unbind()
    out = fastattn.attention(q, k.requires_grad_(), v, causal=True, backend="cuda")
    out.sum().backward()


def decode(dtype: torch.dtype) -> None:
    q, cache = torch.randn(1, 1, 4, 64).to(dtype), torch.randn(2, 1, 600, 2, 64).to(dtype)
    lengths = torch.tensor([600], dtype=torch.int32)
    fastattn.attention_decode(q, *cache.unbind(), cache_seqlens=lengths, backend="cuda")


def cross_entropy(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 5000).to(dtype).requires_grad_()
    target = torch.tensor([11, 2500, 4999])  # none in thread 0's columns
    fastattn.cross_entropy(logits, target, backend="cuda").backward()


@pytest.fixture
def emulator(emulated_arch: int) -> Iterator[Library]:
    emulator = Library(emulated.build())
    yield emulator
    emulator.set_options()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "run", [attention, attention_and_gradients, decode, cross_entropy], ids=lambda f: f.__name__
)
def test_every_barrier_is_needed(
    emulator: Library, run: Callable[[torch.dtype], None], dtype: torch.dtype
) -> None:
    emulator.passed_places()
    emulator.set_options("without=?")
    try:
        run(dtype)
    except RuntimeError as error:
        if "can't take this problem" not in str(error):
            raise
        pytest.skip(str(error))
    places = emulator.passed_places()
    assert places
    for place in places:
        emulator.set_options(f"without={place}")
        with pytest.raises(RuntimeError, match="emulator: "):
            run(dtype)
            pytest.fail(f"nothing is wrong without {place}")
