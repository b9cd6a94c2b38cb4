"""What can be said of the Triton kernels' machine code without a GPU: part of `make gates`.

Runs the launchers on problems of every kind with a driver that only compiles, for every
architecture, and fails on kernels that don't compile, spills, more registers, shared memory or time
to compile than the budget below, and kernels for tensor cores without tensor core instructions.

    python tests/triton_gates.py [ARCH …]
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # whatever its cache has

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from fake_gpu import SHARED_MEMORY, Compiled, FakeDriver, cpu_seconds, use
from fastattn.kernels.attention_bwd import attn_bwd
from fastattn.kernels.attention_decode import attn_decode
from fastattn.kernels.attention_entropy import attn_entropy
from fastattn.kernels.attention_fwd import attn_fwd
from fastattn.kernels.cross_entropy import cross_entropy_fwd
from fastattn.kernels.linear_cross_entropy import linear_cross_entropy_fwd
from gates import counted, machine_code
from triton.errors import TritonError

from fastattn.problem import (
    AttentionProblem,
    CrossEntropyProblem,
    DecodeProblem,
    LinearCrossEntropyProblem,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# what products compile to, by architecture
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")  # mma.sync, wgmma, tcgen05


class Budget(NamedTuple):
    registers: int  # a thread, at most
    tensor_cores: bool = False  # of 16-bit problems
    spills: int = 0  # accesses to local memory of all options at once, and in fp32, at most


BUDGET = {
    "attn_entropy_kernel": Budget(255, tensor_cores=True, spills=4),
    "attn_fwd_kernel": Budget(255, tensor_cores=True),
    "attn_bwd_dq_kernel": Budget(255, tensor_cores=True, spills=297),
    "attn_bwd_dkv_kernel": Budget(255, tensor_cores=True, spills=10),
    "attn_decode_kernel": Budget(255, spills=6),
    "attn_decode_combine_kernel": Budget(66),
    "cache_append_kernel": Budget(64),
    "cross_entropy_kernel": Budget(128),
    "linear_cross_entropy_kernel": Budget(255, tensor_cores=True, spills=13),
    "linear_cross_entropy_merge_kernel": Budget(64),
}


# --- problems -------------------------------------------------------------------------------------


def attention(
    dtype: torch.dtype,
    head_dim: int,
    rich: bool = False,
    heads_k: int = 8,
    softcap: float = 0.0,
    window_left: int = -1,
) -> None:
    """Forward, backward and entropy; of plain causal attention, or with all options."""
    q = torch.empty(2, 1024, 8, head_dim, dtype=dtype)
    k = v = torch.empty(2, 1024, heads_k, head_dim, dtype=dtype)
    p = AttentionProblem(q, k, v, window_left=window_left, window_right=0, softcap=softcap)
    p = p._replace(scale=head_dim**-0.5)
    if rich:
        p = p._replace(
            mask=torch.empty(1, 8, 1024, 1024, dtype=torch.bool),
            bias=torch.empty(1, 8, 1024, 1024, dtype=dtype),
            alibi_slopes=torch.empty(2, 8),
            sinks=torch.empty(8),
            seed=torch.tensor(0),
            window_left=512,
            softcap=30.0,
            dropout_p=0.1,
        )
    out, lse = attn_fwd(p)
    attn_bwd(p, out, lse, out, lse if rich else None, False)
    attn_entropy(p, lse)


def packed_attention(dtype: torch.dtype, head_dim: int) -> None:
    q = torch.empty(4096, 8, head_dim, dtype=dtype)
    offsets = torch.empty(5, dtype=torch.int32)
    p = AttentionProblem(q, q, q, cu_seqlens_q=offsets, cu_seqlens_k=offsets, window_right=0)
    p = p._replace(max_seqlen_q=1024, max_seqlen_k=1024, scale=head_dim**-0.5)
    out, lse = attn_fwd(p)
    attn_bwd(p, out, lse, out, None, False)


def decoding(dtype: torch.dtype, head_dim: int, paged: bool) -> None:
    q, k = (torch.empty(4, 1, heads, head_dim, dtype=dtype) for heads in (32, 8))
    cache = torch.empty(64, 256, 8, head_dim, dtype=dtype) if paged else None
    cache = torch.empty(4, 4096, 8, head_dim, dtype=dtype) if cache is None else cache
    p = DecodeProblem(q, cache, cache, torch.empty(4, dtype=torch.int32), k, k, window_right=0)
    if paged:
        table = torch.empty(4, 16, dtype=torch.int32)
        cos, positions = (
            torch.empty(8192, head_dim // 2, dtype=dtype),
            torch.zeros_like(table[:, 0]),
        )
        p = p._replace(
            rotary_cos=cos, rotary_sin=cos, block_table=table, cache_seqlens=positions,
            softcap=30.0, alibi_slopes=torch.empty(32), sinks=torch.empty(32),
        )  # fmt: skip
    attn_decode(p)


def losses(dtype: torch.dtype, vocab: int, rich: bool) -> None:
    logits, target = torch.empty(64, vocab, dtype=dtype), torch.empty(64, dtype=torch.int64)
    p = CrossEntropyProblem(logits, target)
    if rich:
        p = p._replace(weight=torch.empty(vocab), label_smoothing=0.1, z_loss=1e-4, softcap=30.0)
    cross_entropy_fwd(p, torch.empty(()), logits)
    if dtype == SINGLE:  # what linear cross-entropy's products read
        cross_entropy_fwd(p, torch.empty(()), torch.empty_like(logits, dtype=torch.float16))


def linear_losses(dtype: torch.dtype, channels: int, vocab: int, rich: bool) -> None:
    x, w = torch.empty(4096, channels, dtype=dtype), torch.empty(vocab, channels, dtype=dtype)
    p = LinearCrossEntropyProblem(x, w, None, torch.empty(4096, dtype=torch.int64))
    if rich:
        options = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
        p = p._replace(linear_bias=w[:, 0].clone(), weight=torch.empty(vocab), **options)
    linear_cross_entropy_fwd(p)


HALF, SINGLE = torch.bfloat16, torch.float32
PROBLEMS: dict[str, Callable[[], None]] = {
    "attention D 64": lambda: attention(HALF, 64),
    "attention D 128": lambda: attention(HALF, 128),
    "attention D 256": lambda: attention(HALF, 256),
    "attention D 80, grouped": lambda: attention(HALF, 80, heads_k=2),
    "attention D 128, grouped": lambda: attention(HALF, 128, heads_k=2),
    "attention D 64, packed": lambda: packed_attention(HALF, 64),
    "attention D 128, softcap": lambda: attention(HALF, 128, softcap=30.0),
    "attention D 64, window": lambda: attention(HALF, 64, window_left=256),
    "attention D 128, window": lambda: attention(HALF, 128, window_left=256),
    "attention D 256, window": lambda: attention(HALF, 256, window_left=256),
    "attention D 128, everything": lambda: attention(HALF, 128, rich=True),
    "attention D 64, fp32": lambda: attention(SINGLE, 64),
    "attention D 128, fp32": lambda: attention(SINGLE, 128),
    "attention D 256, fp32": lambda: attention(SINGLE, 256),
    "decoding D 128": lambda: decoding(HALF, 128, paged=False),
    "decoding D 128, paged": lambda: decoding(HALF, 128, paged=True),
    "decoding D 256": lambda: decoding(HALF, 256, paged=False),
    "decoding D 128, fp32": lambda: decoding(SINGLE, 128, paged=False),
    "losses V 128256": lambda: losses(HALF, 128256, rich=False),
    "losses V 50257, rich": lambda: losses(HALF, 50257, rich=True),
    "losses V 50257, fp32": lambda: losses(SINGLE, 50257, rich=False),
    "linear losses": lambda: linear_losses(HALF, 4096, 128256, rich=False),
    "linear losses, everything": lambda: linear_losses(HALF, 1000, 50257, rich=True),
    "linear losses, fp32": lambda: linear_losses(SINGLE, 768, 50257, rich=False),
}


# --- the gate -------------------------------------------------------------------------------------


# Spills that no tile tried so far is without, and how many: the most of triton 3.6.0, 3.7.1 and
# 3.9.0, each of which has some that the others don't.
KNOWN = {
    ("attention D 80, grouped", "attn_bwd_dkv_kernel", 120): 7,
    ("attention D 80, grouped", "attn_fwd_kernel", 86): 8,
    ("attention D 80, grouped", "attn_fwd_kernel", 89): 8,
    ("attention D 128", "attn_bwd_dq_kernel", 100): 2,
    ("attention D 128, grouped", "attn_bwd_dq_kernel", 100): 2,
    ("attention D 128, softcap", "attn_bwd_dkv_kernel", 80): 4,
    ("attention D 128, softcap", "attn_bwd_dq_kernel", 120): 8,
    ("attention D 128, softcap", "attn_entropy_kernel", 80): 2,
    ("attention D 128, softcap", "attn_entropy_kernel", 86): 2,
    ("attention D 128, softcap", "attn_entropy_kernel", 89): 2,
    ("attention D 256", "attn_fwd_kernel", 80): 8,
    ("attention D 256, window", "attn_fwd_kernel", 80): 8,
    ("attention D 256, window", "attn_fwd_kernel", 90): 8,
}

# Of CPU, to compile a kernel; and where it takes more, with triton 3.9.0 alone and at head dim 128:
# docs/design.md says on what.
SECONDS = 3.0
SLOW = {("attn_bwd_dkv_kernel", 100): 5.0}


class Row(NamedTuple):
    problem: str
    arch: int
    kernel: Compiled
    registers: int
    spills: int  # accesses to local memory
    tensor_cores: int  # instructions

    def __str__(self) -> str:
        return (
            f"{self.problem:<28} {self.kernel.name:<27} sm_{self.arch:<4} {self.registers:>4}"
            f" {self.spills:>6} {self.kernel.shared:>7} {self.tensor_cores:>5}"
            f" {self.kernel.seconds:>5.1f}"
        )

    def faults(self) -> list[str]:
        budget = BUDGET.get(self.kernel.name)
        if budget is None:
            return ["no row in the budget of tests/triton_gates.py"]
        found = []
        if self.registers > budget.registers:
            found.append(f"{self.registers} registers, {budget.registers} at most")
        fp32 = "fp32" in self.problem
        known = KNOWN.get((self.problem, self.kernel.name, self.arch), 0)
        if self.spills > (budget.spills if fp32 or "everything" in self.problem else known):
            found.append(f"{self.spills} accesses to local memory")
        if self.kernel.shared > SHARED_MEMORY[self.arch]:
            found.append(f"{self.kernel.shared} bytes of shared memory")
        if self.kernel.seconds > SLOW.get((self.kernel.name, self.arch), SECONDS):
            found.append(f"{self.kernel.seconds:.1f} s to compile")
        if budget.tensor_cores and not fp32 and not self.tensor_cores:
            found.append("no tensor core instruction")
        return found


def rows(driver: FakeDriver, problem: str) -> Iterator[Row | str]:
    """A row a kernel that compiles; if one doesn't, why, and no further one."""
    driver.compiled.clear()
    driver.since = cpu_seconds()
    error = None
    try:
        PROBLEMS[problem]()
    except (TritonError, RuntimeError) as caught:  # the latter of a pass of the compiler
        error = f"{type(caught).__name__}: {caught}"
    for kernel in driver.compiled:
        yield Row(problem, driver.arch, kernel, *measured(kernel))
    if error is not None:
        yield f"{problem:<28} sm_{driver.arch}: the next kernel does not compile: {error}"


def measured(kernel: Compiled) -> tuple[int, int, int]:
    """Registers, accesses to local memory, and tensor core instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+)", usage)
        assert found, usage
        (code,) = machine_code(str(CUOBJDUMP), Path(file.name)).values()
    ops = counted(code)
    return int(found[1]), ops["LDL"] + ops["STL"], sum(ops[name] for name in TENSOR_CORES)


def warm_up() -> None:
    """The first kernel that a process compiles has half a second of imports with it."""
    cross_entropy_fwd(
        CrossEntropyProblem(torch.empty(1, 8), torch.zeros(1, dtype=torch.int64)), None, None
    )


def main(archs: list[int], problems: list[str]) -> int:
    print(f"triton {triton.__version__}")
    numbers = f"{'regs':>4} {'spills':>6} {'smem':>7} {'mma':>5} {'s':>5}"
    print(f"{'problem':<28} {'kernel':<27} {'arch':<7} {numbers}")
    use(min(SHARED_MEMORY))
    warm_up()
    count = failed = 0
    for arch in archs:
        driver = use(arch)
        for row in itertools.chain.from_iterable(rows(driver, problem) for problem in problems):
            print(row, flush=True)
            found = [row] if isinstance(row, str) else row.faults()
            for fault in found:
                print(f"  FAILED: {fault}")
            count, failed = count + 1, failed + bool(found)
    print(f"triton gates: {count} kernels, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    chosen = [int(a) for a in arguments if a.isdigit()] or list(SHARED_MEMORY)
    sys.exit(main(chosen, [a for a in arguments if not a.isdigit()] or list(PROBLEMS)))
