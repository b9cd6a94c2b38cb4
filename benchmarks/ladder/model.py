"""What can be said of a rung without running it: what the compiler made of it, and a model of what
bounds it on Hopper.

The model counts the cycles that each unit of an SM needs for 1024 scores and their share of the
outputs, which are 4096·D FLOPs, if it were never idle; the slowest unit is the bound. The units are
the tensor cores (4096 FLOPs of bf16 a cycle), multiply-adds in fp32 (128), exponentials (16),
instructions (one of each of four warps) and the way to the L1 cache and shared memory (an access of
a warp, or one turn of it, a cycle). Left out is what only adds: latencies, barriers, the L2 cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .rungs import Rung, compile_for_gpu, load, nvcc

sys.path.insert(0, str(nvcc.ROOT / "tests"))
import gates
import pipe_cycles
from pipe_cycles import Instruction

SMS, HERTZ = 132, 1.83e9  # of an H100 SXM or H200: 989 TFLOP/s in bf16
SCORES = 1024
MMA_SYNC = 0.62  # of the tensor cores' rate: what mma.sync reaches on Hopper

Cycles = dict[str, float]


class Compiled(NamedTuple):
    """A rung's kernel for one head dim; of rung 1, the kernel of scores."""

    registers: int
    shared: int  # bytes
    spills: int  # bytes
    products: int  # instructions that multiply, in the hot loop
    instructions: int  # all there

    @property
    def mix(self) -> str:
        return f"{self.products} of {self.instructions}"


# --- what the compiler made -----------------------------------------------------------------------


def compiled(rung: Rung, head_dim: int, arch: int = 90, folder: Path | None = None) -> Compiled:
    library = compile_for_gpu(rung, arch, *([folder] if folder else []))
    kernels = list(gates.kernels_of(library.with_suffix(".so.log")))
    names = gates.readable([kernel.symbol for kernel in kernels])
    kernel = next(
        k
        for k in kernels
        if f"<{head_dim}>" in names[k.symbol] and not names[k.symbol].startswith("output")
    )
    shared = load(library).ladder_shared_bytes(head_dim)
    cuobjdump = gates.find_tool("cuobjdump")
    if cuobjdump is None:
        return Compiled(kernel.registers, shared, kernel.spills, 0, 0)
    code = gates.machine_code(cuobjdump, library)[kernel.symbol, kernel.arch]
    return Compiled(kernel.registers, shared, kernel.spills, *mix(code))


def mix(code: list[Instruction]) -> tuple[int, int]:
    """Products and instructions of the hot loop: the smallest with a third of all products.

    Those are the tensor cores', or where a kernel has none multiply-adds in fp32.
    """
    tensor_cores = ("HMMA", "HGMMA")
    uses_them = any(i.opcode.startswith(tensor_cores) for i in code)

    def products(instructions: list[Instruction]) -> int:
        return sum(i.opcode.startswith(tensor_cores if uses_them else "FFMA") for i in instructions)

    loops = [loop for loop in pipe_cycles.loops(code) if 3 * products(loop) >= products(code)]
    hot = min(loops, key=len, default=code)
    return products(hot), len(hot)


# --- the model ------------------------------------------------------------------------------------


def naive(D: int, code: Compiled) -> Cycles:
    # A warp of 32 scores reads q once for all lanes and k from 32 lines; 32 columns of an output
    # take a weight and a line of values.
    return {"loads": SCORES * D * (33 / 32 + 2 / 32), "multiply-adds": 2 * SCORES * D / 128}


def online(D: int, code: Compiled) -> Cycles:
    # A score: D/32 loads of k and as many of v, five shuffles, one round of the loop.
    return {
        "loads and shuffles": SCORES * (D / 16 + 5),
        "instructions": SCORES * code.instructions / 4,
    }


def tiled(D: int, code: Compiled) -> Cycles:
    # For 64 multiply-adds (16 cycles) 4 loads of q and 4 of k in two turns each; for D of them 4 of
    # weights and D/16 of v in two turns.
    half = SCORES * D / 128
    return {
        "multiply-adds": 2 * half,
        "shared memory": half * 12 / 16 + half * (4 + D / 8) / (D / 4),
        "instructions": 2 * half * code.instructions / code.products + SCORES / 32 * 14 / 4,
    }


def exponentials(per_iteration: int, code: Compiled) -> Cycles:
    """`per_iteration`: a warp's scores in a round of the loop."""
    return {
        "exponentials": SCORES / 16,
        "instructions": SCORES / per_iteration * code.instructions / 4,
    }


def tensor_cores(D: int, code: Compiled) -> Cycles:
    # For 16 × 64 scores D/16 · 16 loads of K in 8 turns each, D/2 · 4 of V in 4 turns.
    return exponentials(1024, code) | {
        "tensor cores": 4 * SCORES * D / 4096 / MMA_SYNC,
        "shared memory": D / 16 * 16 * 8 + D / 2 * 4 * 4,
    }


def swizzled(D: int, code: Compiled) -> Cycles:
    # The same scores: D/16 · 4 times ldmatrix for K, as often for V, 512 bytes each.
    return exponentials(1024, code) | {
        "tensor cores": 4 * SCORES * D / 4096 / MMA_SYNC,
        "shared memory": 2 * D / 16 * 4 * 4,
    }


def wgmma_tma(D: int, code: Compiled) -> Cycles:
    softmax = exponentials(1024, code)
    return {"products, then softmax": 4 * SCORES * D / 4096 + max(softmax.values())}


def ping_pong(D: int, code: Compiled) -> Cycles:
    return exponentials(2048, code) | {"tensor cores": 4 * SCORES * D / 4096}


MODELS: dict[str, Callable[[int, Compiled], Cycles]] = {
    "01_naive": naive,
    "02_online": online,
    "03_tiled": tiled,
    "04_tensor_cores": tensor_cores,
    "05_swizzled": swizzled,
    "06_wgmma_tma": wgmma_tma,
    "07_ping_pong": ping_pong,
}


class Bound(NamedTuple):
    unit: str
    flops: float  # a second, at most


def bound(rung: Rung, head_dim: int, code: Compiled) -> Bound:
    cycles = MODELS[rung.stem](head_dim, code)
    unit = max(cycles, key=lambda name: cycles[name])
    return Bound(unit, 4 * SCORES * head_dim / cycles[unit] * SMS * HERTZ)
