"""Writes wgmma.cuh: one function for each shape of wgmma.mma_async that the kernels use.

An asm statement must name each of its up to 133 operands; nothing in C++ writes them out. nvcc.py
calls this before it compiles; tests/emulator has the same functions as templates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

COLUMNS = (64, 80, 96, 112, 128, 192, 256)  # n: block_n and head dims of csrc/cuda/tiles_sm90.cuh
FORMATS = ("bf16", "fp16")

HEADER = """\
// wgmma.mma_async: d (64, n) = a (64, 16) · b (16, n) or += that, in fp32. Written by wgmma.py.
//
// Operands are descriptors of tiles in shared memory, or registers for a. d[i][j] holds column
// 8·i + 2·(lane % 4) + j % 2 of row 16·warp + lane / 4 + 8·(j / 2).
#pragma once

namespace fastattn::cuda::ptx {
"""


def function(n: int, name: str, a_in_registers: bool) -> str:
    count = n // 2  # registers of d
    ptx = name.replace("fp16", "f16")
    d = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i // 4}][{i % 4}])' for i in range(count))
    if a_in_registers:
        template, a = "template <Major kB>", "const uint32_t (&a)[4]"
        registers = ", ".join(f"%{count + i}" for i in range(4))
        operands, flags = f"{{{registers}}}, %{count + 4}", f"%{count + 6}"
        inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) + ', "l"(b), "r"(int(accumulate))'
        inputs += ', "n"(int(kB))'
        predicate = count + 5
    else:
        template, a = "template <Major kA, Major kB>", "uint64_t a"
        operands, flags = f"%{count}, %{count + 1}", f"%{count + 3}, %{count + 4}"
        inputs = '"l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB))'
        predicate = count + 2
    return f"""
{template}
FASTATTN_DEVICE void wgmma(float (&d)[{n // 8}][4], {a}, uint64_t b, bool accumulate, {name}) {{
  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{predicate}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} "
      "{{{d}}}, {operands}, p, 1, 1, {flags};\\n}}"
      : {outputs}
      : {inputs});
}}
"""


def functions(columns: Iterable[int]) -> Iterator[str]:
    for n in columns:
        for name in FORMATS:
            for a_in_registers in (False, True):
                yield function(n, name, a_in_registers)


def write(file: Path, columns: Iterable[int] = COLUMNS) -> None:
    """Only if it would change, so that nothing is compiled again for it."""
    text = HEADER + "".join(functions(columns)) + "\n}  // namespace fastattn::cuda::ptx\n"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
