"""Tile sizes of the kernels, by architecture, dtype and head dim."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

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


INTERPRETED = Tile(64, 64)


@functools.cache
def arch() -> int:
    """Compute capability · 10 of the current device; 0 in the interpreter."""
    return 0 if interpreter.running() else triton.runtime.driver.active.get_current_target().arch


def attention_fwd(q: Tensor, head_dim: int, head_dim_v: int, seqlen_q: int) -> Tile:
    if arch() == 0:
        return INTERPRETED
    return Tile(64, 64)


def attention_bwd_dq(q: Tensor, head_dim: int, head_dim_v: int) -> Tile:
    if arch() == 0:
        return INTERPRETED
    return Tile(64, 64)


def attention_bwd_dkv(q: Tensor, head_dim: int, head_dim_v: int) -> Tile:
    if arch() == 0:
        return INTERPRETED
    return Tile(64, 64)


def cross_entropy(dtype: torch.dtype, vocab: int, smoothed: bool) -> Tile:
    if arch() == 0:
        return Tile(1, 1024)
    block = min(triton.next_power_of_2(vocab), 4096)
    return Tile(1, block, min(max(block // 256, 1), 16))


ONE_ROW = Tile(1, 1, 1)  # a program has a row of at most 256 elements


def attention_decode(dtype: torch.dtype, head_dim: int, head_dim_v: int, rows: int) -> Tile:
    block_m = min(max(16, triton.next_power_of_2(rows)), 64)
    if arch() == 0:
        return Tile(block_m, 64)
    return Tile(block_m, 64, 4, 3)


def splits(programs: int, blocks: int) -> int:
    """How many programs share the keys of a sequence, to fill the GPU twice."""
    return max(1, min(triton.cdiv(2 * multiprocessors(), programs), blocks // 4, 128))


@functools.cache
def multiprocessors() -> int:
    if arch() == 0:
        return 8
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(driver.get_current_device())["multiprocessor_count"]
