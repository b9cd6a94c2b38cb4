"""Prints the PTX that Triton makes of a (64, 128) by (128, 128) product for sm_90: what
tests/test_ptx.py holds our own to. In a process of its own, where Triton compiles.

    python tests/triton_products.py k|mn    how B lies: its rows are columns of B, or rows
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K_MAJOR: tl.constexpr):
    a_tile = tl.load(a + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    if K_MAJOR:
        b_tile = tl.load(b + tl.arange(0, N)[:, None] * K + tl.arange(0, K)[None, :])
        c_tile = tl.dot(a_tile, tl.trans(b_tile))
    else:
        b_tile = tl.load(b + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :])
        c_tile = tl.dot(a_tile, b_tile)
    tl.store(c + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], c_tile)


if __name__ == "__main__":
    types = {"a": "*bf16", "b": "*bf16", "c": "*fp32"}
    sizes = {"M": 64, "N": 128, "K": 128, "K_MAJOR": sys.argv[1] == "k"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(product, types, sizes, aligned)
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    print(compiled.asm["ptx"])
