"""The rungs on the emulator of tests/: no GPU, small shapes, every race and bound watched."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.testing import FORWARD_FACTOR, assert_close_to_reference

from .rungs import FP32, HEAD_DIMS, RUNGS, Rung, arguments, nvcc, workspace_of

sys.path.insert(0, str(nvcc.ROOT / "tests"))
from emulator import build
from emulator.runtime import Library

MULTIPROCESSORS = 3  # of the device that is emulated: a persistent block has several tiles to do


class Results(NamedTuple):
    ours: Tensor
    exact: Tensor  # float64
    eager: Tensor  # in the rung's dtype


@functools.cache
def library(rung: Rung) -> Library:
    source = rung.source.relative_to(nvcc.ROOT)
    return Library(build.build(f"ladder_{rung.stem}", [source], ["-Wno-psabi"]))


def run(rung: Rung, head_dim: int, seqlen: int, heads: int = 2) -> Results:
    """Raises EmulatorError where the emulator finds fault."""
    g = torch.Generator().manual_seed(0)
    shape = heads, seqlen, head_dim
    q, k, v = (torch.randn(shape, generator=g).to(rung.dtype) for _ in range(3))
    out, workspace = torch.full_like(q, torch.nan), workspace_of(rung, q)
    emulated = library(rung)
    with emulated.buffers({"q": q, "k": k, "v": v}, {"out": out, "workspace": workspace}):
        call = arguments(q, k, v, out, workspace)
        emulated.call("ladder_forward", *call, MULTIPROCESSORS, None)
    exact = weights_of(q.double(), k.double()) @ v.double()
    eager = weights_of(q, k) @ v if rung.dtype != FP32 else add_in_order(weights_of(q, k), v)
    return Results(out, exact, eager)


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)


def add_in_order(weights: Tensor, v: Tensor) -> Tensor:
    """weights @ v, key by key, as the rungs add in fp32: torch's product has smaller errors."""
    out = torch.zeros_like(v)
    for key in range(v.shape[1]):
        out += weights[:, :, key, None] * v[:, None, key]
    return out


def check(results: Results, name: str) -> None:
    """Raises AssertionError beyond twice eager's error and a rounding."""
    assert_close_to_reference(*results, FORWARD_FACTOR, name)


def lines() -> Iterator[str]:
    """What --emulate says, a line a run."""
    for rung in RUNGS:
        for head_dim in HEAD_DIMS:
            for seqlen in (64, 150):
                library(rung)
                start = time.perf_counter()
                found = run(rung, head_dim, seqlen)
                seconds = time.perf_counter() - start
                check(found, rung.stem)
                ours, eager = ((x.double() - found.exact).abs().max() for x in found[::2])
                yield (
                    f"{rung.stem:<16} D {head_dim:<4} S {seqlen:<4} error {ours:.1e},"
                    f" eager's {eager:.1e}, {seconds:.2f} s"
                )
