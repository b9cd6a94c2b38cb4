"""The memory a call needs."""

import torch

from fastattn.memory import peak_memory

MIB = 1 << 20


def test_peak_memory_sees_a_large_block():
    peak = peak_memory(lambda: bytearray(b"x" * (64 * MIB)))
    if peak is not None:  # None off Linux
        assert 60 * MIB < peak < 300 * MIB


def test_peak_memory_sees_blocks_that_malloc_could_have_kept():
    kept = [torch.ones(MIB // 4) for _ in range(64)]  # 1 MiB each, on the heap
    del kept
    peak = peak_memory(lambda: [torch.ones(MIB // 4) for _ in range(64)])
    if peak is not None:
        assert 60 * MIB < peak < 300 * MIB
