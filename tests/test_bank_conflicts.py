"""Conflicts of shared memory's banks, counted by the emulator: that it counts them, and that the
kernels with tensor cores have none."""

from __future__ import annotations

from collections.abc import Iterator

import emulated
import pytest
import torch
from emulator import build
from emulator.runtime import Library, SharedAccess
from test_emulator import SOURCES, Kernels

from fastattn import backend_cuda
from fastattn.testing import (
    Case,
    DecodeCase,
    make_decode_problem,
    make_problem,
    random_like,
)


@pytest.mark.parametrize(
    "kernel, stride, wavefronts, conflicts",
    [
        ("strided_2", 2, 1, 0),
        ("strided_4", 0, 1, 0),  # one word for all lanes
        ("strided_4", 4, 1, 0),
        ("strided_4", 8, 2, 1),
        ("strided_4", 128, 32, 31),
        ("strided_8", 8, 2, 0),
        ("strided_8", 16, 4, 2),
        ("strided_16", 16, 4, 0),
        ("strided_16", 32, 8, 4),
        ("strided_16", 144, 4, 0),  # a row of 128 bytes and 16 more
        ("strided_ldmatrix", 16, 4, 0),
        ("strided_ldmatrix", 128, 32, 28),
    ],
)
def test_counts_wavefronts(kernel: str, stride: int, wavefronts: int, conflicts: int) -> None:
    kernels = Kernels(build.build("emulator_test", SOURCES))
    kernels.bank_conflicts()
    out = torch.empty(4, dtype=torch.int32)
    kernels.run(kernel, write=[out], numbers=[stride], shared_bytes=8192, options="banks=1,races=0")
    (access,) = kernels.bank_conflicts()
    assert access.place.startswith("test_kernels.cu:")
    assert access[2:] == (1, wavefronts, conflicts, 0)
    assert kernels.bank_conflicts() == []


def conflicts(library: Library) -> list[SharedAccess]:
    accesses = library.bank_conflicts()
    assert accesses
    return [access for access in accesses if access.conflicts]


@pytest.fixture
def library(emulated_arch: int) -> Iterator[Library]:
    library = Library(emulated.build())
    library.bank_conflicts()
    library.set_options("banks=1,races=0")
    yield library
    library.set_options()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [63, 64, 96, 128, 192, 256])
def test_attention_has_none(library: Library, head_dim: int, dtype: torch.dtype) -> None:
    p = make_problem(Case("", (1, 33, 70), (1, 1), head_dim, window=(-1, 0)), dtype)
    out, lse = backend_cuda.attn_fwd(p)
    assert conflicts(library) == []
    backend_cuda.attn_bwd(p, out, lse, random_like(out, 1), None, True)
    assert conflicts(library) == []


@pytest.mark.parametrize("heads", [(2, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 160])
def test_decoding_has_none(library: Library, head_dim: int, heads: tuple[int, int]) -> None:
    case = DecodeCase("", (70,), capacity=70, heads=heads, head_dim=head_dim)
    backend_cuda.attn_decode(make_decode_problem(case, torch.float16))
    assert conflicts(library) == []
