"""What the probes of mma and wgmma are given, and where in it the matrices are.

A lane of mma has its fragments in its words: a and b in pairs of 16-bit elements, then four floats
of d. wgmma's threads have a and b as tiles lie in shared memory, word i of thread t at 128·i + t,
then the floats of d.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc" / "cuda"))
import wgmma

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# wgmma_<major of a, or registers>_<major of b>_<columns>_<format>, as products_sm90.cuh has them
WGMMA_PROBES = tuple(
    f"wgmma_{operands}_{n}_{format}"
    for operands in ("k_k", "registers_mn", "mn_mn")
    for n in (wgmma.COLUMNS if operands != "mn_mn" else (64,))
    for format in wgmma.FORMATS
)


def is_product(name: str) -> bool:
    return name.startswith(("mma_", "wgmma_"))


def dtype_of(name: str) -> torch.dtype:
    return FORMATS[name.rsplit("_", 1)[1]]


def columns_of(name: str) -> int:
    """Of wgmma's d."""
    return int(name.split("_")[-2])


def sums_of(name: str) -> int:
    """Words of d that a thread has."""
    return columns_of(name) // 2 if name.startswith("wgmma_") else 4


def random_bits(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def inputs(name: str, shape: tuple[int, int, int]) -> list[tuple[str, Tensor]]:
    """The first kinds have exact sums: integers, and for mma one product in each."""
    dtype, sums = dtype_of(name), (*shape[:2], sums_of(name))
    elements = (*shape[:2], 2 * (shape[2] - sums[2]))

    def words(ab: Tensor, d: Tensor) -> Tensor:
        return torch.cat((ab.to(dtype).view(torch.int32), d.float().view(torch.int32)), dim=-1)

    def numbers_from(low: int, high: int) -> Tensor:
        return torch.randn(elements) * torch.exp2(torch.randint(low, high, elements).float())

    integers = torch.randint(-16, 17, elements), torch.randint(-4096, 4097, sums)
    kinds = [("integers", words(*integers))]
    if name.startswith("mma_"):
        one = numbers_from(-12, 12).where(single(elements[2], shape[1]), 0.0)
        kinds.append(("single products", words(one, torch.zeros(sums))))
    d = torch.randn(sums)
    kinds.append(("numbers", words(torch.randn(elements), d)))
    kinds.append(("numbers of many sizes", words(numbers_from(-9, 5), 8 * d)))
    if name.startswith("mma_"):
        kinds.append(("random bits", random_bits(shape)))
    return kinds


def single(elements: int, lanes: int) -> Tensor:
    """Which elements of a lane are kept so that a has column 0 alone: those that lanes of t = 0
    have as the first of their first two words; and all of b."""
    kept = torch.arange(elements) >= elements * 2 // 3
    kept = kept.expand(lanes, -1).clone()
    kept[::4, 0:4:2] = True
    return kept


# --- matrices -------------------------------------------------------------------------------------


def operands(name: str, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a (blocks, m, k), b (blocks, k, n), d (blocks, m, n) in float64."""
    d = words[..., -sums_of(name) :].contiguous().view(torch.float32).double()
    if name.startswith("mma_"):
        return *mma_operands(name, words), matrix(name, d)
    d[1::2] = 0.0  # of every other block d is not added
    return *wgmma_operands(name, words), matrix(name, d)


def mma_operands(name: str, words: Tensor) -> tuple[Tensor, Tensor]:
    k = 16 if "k16" in name else 8
    lane = torch.arange(32)
    group, pair = lane // 4, 2 * (lane % 4)
    halves = words[..., :-4].contiguous().view(dtype_of(name)).double()
    halves = halves.view(*words.shape[:2], -1, 2)
    a = torch.zeros(len(words), 16, k, dtype=torch.float64)
    b = torch.zeros(len(words), k, 8, dtype=torch.float64)
    for q in range(k // 4):
        for e in range(2):
            a[:, group + q % 2 * 8, pair + q // 2 * 8 + e] = halves[:, :, q, e]
    for q in range(k // 8):
        for e in range(2):
            b[:, pair + q * 8 + e, group] = halves[:, :, k // 4 + q, e]
    return a, b


def wgmma_operands(name: str, words: Tensor) -> tuple[Tensor, Tensor]:
    n = columns_of(name)
    _, major_a, major_b, *_ = name.split("_")
    tiles = words[..., : -sums_of(name)].transpose(1, 2).flatten(1).contiguous()
    a = tile(tiles[:, :2048].view(dtype_of(name)).double(), 64)
    b = tile(tiles[:, 2048:].view(dtype_of(name)).double(), n if major_b == "k" else 64)
    return a.mT if major_a == "mn" else a, b.mT if major_b == "k" else b[:, :, :n]


def tile(elements: Tensor, rows: int) -> Tensor:
    """(blocks, rows, 64 · panels) of panels of 64 columns, whose chunks of 8 are swizzled."""
    chunks = elements.view(len(elements), -1, rows, 8, 8)
    swizzled = torch.arange(8) ^ (torch.arange(rows)[:, None] % 8)
    chunks = chunks.gather(3, swizzled[:, :, None].expand(*chunks.shape[:2], -1, -1, 8))
    return chunks.flatten(3).transpose(1, 2).flatten(2)


def places(name: str, threads: int) -> tuple[Tensor, Tensor]:
    """Rows and columns (threads, words) of d: a warp has 16 rows."""
    thread, word = torch.arange(threads)[:, None], torch.arange(sums_of(name))
    rows = thread // 32 * 16 + thread % 32 // 4 + word // 2 % 2 * 8
    return rows, word // 4 * 8 + thread % 4 * 2 + word % 2


def matrix(name: str, floats: Tensor) -> Tensor:
    """(blocks, m, n) of (blocks, threads, words)."""
    rows, columns = places(name, floats.shape[1])
    d = floats.new_zeros(len(floats), int(rows.max()) + 1, int(columns.max()) + 1)
    d[:, rows, columns] = floats
    return d


def fragments(name: str, d: Tensor) -> Tensor:
    """The reverse of `matrix`."""
    return d[(slice(None), *places(name, 2 * d.shape[1]))]
