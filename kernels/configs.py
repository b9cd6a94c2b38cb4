"""Tile sizes of the kernels, by architecture, dtype and head dim.

None has been timed: they are of sizes that the field has found good, and compile without spills but
for those that tests/triton_gates.py names. sm_80 has mma.sync and 164 KB of shared memory,
sm_120, which stands for sm_86 and sm_89 too, 100 KB; sm_90 has wgmma and 227 KB, sm_100 tcgen05,
which takes 128 rows at a time.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

from . import interpreter


class Tile(NamedTuple):
    """Rows a program keeps, rows that pass by at a time, warps, and stages of the loop's loads."""

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def cdiv(a: int, b: int) -> int:
    """Triton's own takes ten times as long, and so does its next_power_of_2."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


Tiles = tuple[Tile, Tile, Tile]  # for head dims up to 64, 128, 256
ONE_ROW = Tile(1, 1, 1)  # a program has a row of at most 256 elements
ROWS = Tile(128, 1, 4)  # a thread has a row
INTERPRETED = Tile(64, 64)

# 16-bit. A row's reason: the registers a thread of the plain causal kernel (triton 3.9.0), and what
# twice the passing rows (N) and twice the kept ones (M) come to: accesses to local memory that it
# spills; KB of shared memory or columns of tensor memory (512) that a block hasn't got; or it fits,
# in so many registers, and the smaller one stays until a GPU has timed both: tuning.py tries twice
# N. Options take more registers than the plain kernel, and other versions of Triton spill
# elsewhere. One more stage compiles without spills in 30 of the 36 rows; tuning.py tries that too.
#
# Of the forward 128 queries make up for reading K and V again. On sm_90 and at head dim 128, 128
# keys at a time would take 666 instructions where twice 64 take 874, but spill. Tensor descriptors
# would take 571, and 36 registers less (SASS of triton 3.9). Made on the host they add to the
# Python of each launch (how much was not measured), made by the kernel they need an allocator that
# is the whole process's. warp_specialize crashes the compiler on two loops over keys (3.9), or does
# nothing (3.6, of 8 warps).
FWD: dict[int, Tiles] = {
    80: (
        Tile(128, 64, 8, 3),  # 197; N 128: fits, 192; M 256: fits, 253
        Tile(128, 64, 8, 2),  # 244; N 128: spills 68; M 256: spills 175
        Tile(64, 64, 8, 2),  # 189; N 128: 176 KB; M 128: spills 112
    ),
    90: (
        Tile(128, 128, 8, 2),  # 218; N 256: spills 233; M 256: spills 26
        Tile(128, 64, 8, 3),  # 227; N 128: spills 10; M 256: spills 68
        Tile(64, 64, 8, 2),  # 253; N 128: 288 KB; M 128: spills 18
    ),
    100: (
        Tile(128, 64, 4, 3),  # 242; N 128: spills 1091; M 256: spills 1477
        Tile(128, 64, 8, 2),  # 213; N 128: spills 8; M 256: spills 421
        Tile(128, 32, 8, 2),  # 245; N 64: fits, 252; M 256: 608 columns
    ),
    120: (
        Tile(128, 64, 8, 3),  # 194; N 128: fits, 198; M 256: fits, 238
        Tile(128, 64, 8, 2),  # 196; N 128: spills 91; M 256: spills 154
        Tile(64, 32, 8, 2),  # 170; N 64: 104 KB; M 128: 104 KB
    ),
}
# One sum in registers, but q, dout and two products at a time.
BWD_DQ: dict[int, Tiles] = {
    80: (
        Tile(128, 64, 8, 2),  # 186; N 128: spills 66; M 256: spills 38
        Tile(64, 64, 8, 2),  # 164; N 128: fits, 184; M 128: spills 16
        Tile(64, 32, 8, 1),  # 234; N 64: fits, 248; M 128: spills 130
    ),
    90: (
        Tile(128, 64, 8, 2),  # 157; N 128: fits, 254; M 256: spills 60
        Tile(128, 64, 8, 2),  # 222; N 128: fits, 255; M 256: spills 372
        Tile(128, 32, 8, 2),  # 254; N 64: 256 KB; M 256: 320 KB
    ),
    100: (
        Tile(128, 64, 4, 2),  # 237; N 128: spills 462; M 256: spills 321
        Tile(128, 64, 8, 2),  # 185; N 128: spills 23; M 256: 576 columns
        Tile(128, 32, 8, 1),  # 235; N 64: fits, 242; M 256: 289 KB
    ),
    120: (
        Tile(128, 64, 8, 2),  # 184; N 128: spills 108; M 256: spills 133
        Tile(64, 64, 8, 2),  # 174; N 128: 112 KB; M 128: spills 6
        Tile(64, 32, 8, 1),  # 220; N 64: 128 KB; M 128: 160 KB
    ),
}
# Two sums in registers, dk and dv: M are keys, N queries.
BWD_DKV: dict[int, Tiles] = {
    80: (
        Tile(64, 32, 4, 2),  # 188; N 64: spills 24; M 128: spills 43
        Tile(64, 64, 8, 2),  # 174; N 128: fits, 255; M 128: spills 40
        Tile(32, 32, 4, 1),  # 250; N 64: spills 197; M 64: spills 6670
    ),
    90: (
        Tile(128, 64, 8, 2),  # 221; N 128: spills 302; M 256: spills 307
        Tile(128, 32, 8, 2),  # 226; N 64: spills 123; M 256: spills 707
        Tile(32, 32, 8, 1),  # 174; N 64: fits, 174; M 64: spills 339
    ),
    100: (
        Tile(128, 64, 8, 2),  # 185; N 128: spills 105; M 256: 640 columns
        Tile(128, 64, 8, 2),  # 192; N 128: 258 KB; M 256: 896 columns
        Tile(64, 32, 8, 1),  # 221; N 64: fits, 252; M 128: 576 columns
    ),
    120: (
        Tile(64, 32, 4, 2),  # 184; N 64: fits, 250; M 128: spills 74
        Tile(64, 64, 8, 2),  # 170; N 128: 113 KB; M 128: spills 185
        Tile(32, 32, 4, 1),  # 244; N 64: 112 KB; M 64: 112 KB
    ),
}
# fp32 multiplies without tensor cores on every architecture, with whole rows of the operands that a
# program keeps in registers: the fewer, the better. Reasons are those of sm_90.
FP32_FWD: Tiles = (
    Tile(32, 32, 8, 1),  # 54; N 64: spills 200; M 64: fits, 166
    Tile(32, 32, 8, 1),  # 195; N 64: spills 2; M 64: spills 805
    Tile(32, 16, 8, 1),  # 116; N 32: spills 1208; M 64: spills 1608
)
FP32_BWD_DQ: Tiles = (
    Tile(32, 32, 8, 1),  # 242; N 64: spills 244; M 64: spills 320
    Tile(16, 16, 8, 1),  # 209; N 32: spills 282; M 32: spills 283
    Tile(16, 16, 8, 1),  # spills 290, at the least that products take; N 32: 1494; M 32: 1630
)
FP32_BWD_DKV: Tiles = (
    Tile(64, 32, 8, 1),  # 110; N 64: spills 3526; M 128: spills 1145
    Tile(32, 16, 8, 1),  # spills 3; N 32: spills 226; M 64: spills 422
    Tile(16, 16, 8, 1),  # 128; N 32: spills 11; M 32: fits, 168
)


def arch() -> int:
    """Compute capability · 10 of the current device; 0 in the interpreter."""
    return 0 if interpreter.running() else _arch(triton.runtime.driver.active.get_current_device())


@functools.cache
def _arch(device: int) -> int:
    return triton.runtime.driver.active.get_current_target().arch


class Work(NamedTuple):
    """What tiles of attention are chosen by."""

    dtype: torch.dtype
    block_d: int  # the larger of the tiles' two head dims
    # Options, and head dims short of their tiles', want registers: half as many rows of both then.
    heavy: bool


def _of(table: dict[int, Tiles], fp32: Tiles, work: Work) -> Tile:
    at = 0 if work.block_d <= 64 else 1 if work.block_d <= 128 else 2
    if (here := arch()) == 0:
        return INTERPRETED
    if work.dtype == torch.float32:
        tile = fp32[at]
    elif here in (86, 89):
        tile = table[120][at]
    else:
        tile = table[max(known for known in table if known <= here)][at]
    if not work.heavy:
        return tile
    return Tile(
        max(tile.block_m // 2, 16),
        max(tile.block_n // 2, 16),
        tile.warps,
        tile.stages if here in (90, 100) else 1,  # their operands don't pass through registers
    )


def attention_fwd(work: Work, seqlen_q: int) -> Tile:
    tile = _of(FWD, FP32_FWD, work)
    few = max(16, next_power_of_2(seqlen_q))
    return tile if few >= tile.block_m else tile._replace(block_m=few, warps=4)


def attention_bwd_dq(work: Work) -> Tile:
    return _of(BWD_DQ, FP32_BWD_DQ, work)


def attention_bwd_dkv(work: Work) -> Tile:
    """Keys are what a program keeps."""
    return _of(BWD_DKV, FP32_BWD_DKV, work)


def attention_decode(dtype: torch.dtype, block_d: int, rows: int) -> Tile:
    """Keys enough in flight for memory's latency: stages are tiles of K and V being loaded."""
    block_m = min(max(16, next_power_of_2(rows)), 64)
    if arch() == 0:
        return Tile(block_m, 64)
    if dtype == torch.float32:
        return Tile(block_m, 32, 8, 1)
    wide = block_d > 128
    return Tile(block_m, 32 if wide else 64, 4, 2 if wide else 3)


def splits(programs: int, blocks: int) -> int:
    """How many programs share the keys of a sequence: to fill the GPU twice, 4 blocks each."""
    return max(1, min(cdiv(2 * multiprocessors(), programs), blocks // 4, 128))


def multiprocessors() -> int:
    """8 in the interpreter, so that it sees splits."""
    return 8 if arch() == 0 else _multiprocessors(triton.runtime.driver.active.get_current_device())


@functools.cache
def _multiprocessors(device: int) -> int:
    utils = triton.runtime.driver.active.utils
    return utils.get_device_properties(device)["multiprocessor_count"]


def cross_entropy(vocab: int, smoothed: bool) -> Tile:
    """16 bytes a thread of 16-bit logits at a time, twice; half as many where a column has four
    sums. In the interpreter, several blocks a row."""
    if arch() == 0:
        return Tile(1, 1024)
    most = 4096 if smoothed else 8192
    block = min(next_power_of_2(vocab), most)
    return Tile(1, block, max(16 * block // most, 1))


# Rows and classes of a product of long rows, whose sums stay in registers. Reasons as above.
LINEAR: dict[int, Tile] = {
    80: Tile(128, 128, 8, 3),  # 246; N 256: spills 115; M 256: spills 156
    90: Tile(128, 128, 8, 3),  # 214; N 256: spills 70; M 256: spills 46
    100: Tile(128, 128, 8, 2),  # 252; N 256: spills 245; M 256: spills 6; 3 stages: spills 10
    120: Tile(128, 128, 8, 2),  # 240; N 256: spills 52; M 256: spills 132; 3 stages fit, 232
}
FP32_LINEAR = Tile(64, 64, 8, 1)


def linear_cross_entropy(dtype: torch.dtype, heavy: bool) -> Tile:
    """Softcap and smoothed labels want registers: half as many classes then. In the interpreter,
    several blocks of rows and of classes."""
    if (here := arch()) == 0:
        return Tile(16, 32)
    if dtype == torch.float32:
        return FP32_LINEAR
    here = 120 if here in (86, 89) else here
    tile = LINEAR[max(known for known in LINEAR if known <= here)]
    return tile._replace(block_n=tile.block_n // 2) if heavy else tile


def channels_at_a_time(dtype: torch.dtype) -> int:
    """128 bytes of a row: a line of the cache."""
    return 128 // dtype.itemsize
