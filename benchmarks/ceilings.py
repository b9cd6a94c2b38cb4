"""What the device was measured to do at best in this run, and the least time that work can take.

Matrix products: torch.mm of each dtype. In fp32 on a CPU also a loop of fused multiply-adds that
never leaves the registers (fma_probe.cpp), because torch.mm's library may not be written for the
processor at hand: a kernel may beat it, but not the registers. Memory: the faster of a streaming
read and a copy (read and written bytes); of work that does little else, on a CPU, `streaming`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import CORES
from .case import Call, Case
from .device import Device

SOURCE = Path(__file__).with_name("fma_probe.cpp")
BUILT = Path(__file__).resolve().parent.parent / "build"
SIZES = {"cpu": (2048, 256 << 20), "cuda": (8192, 2 << 30)}  # of matrices, of memory in bytes
FMA_ROUNDS = 4_000_000  # about 30 ms
EMULATED_SECONDS = 0.05  # so slow is a small product only without instructions for its dtype


class Ceilings:
    """Best of the run so far, in FLOP/s by the dtype's name, and in B/s."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.gemm: dict[str, float] = {}
        self.fma = 0.0  # fp32, all threads
        self.memory = 0.0

    def measure(self, dtypes: set[torch.dtype]) -> None:
        on = self._device.torch_device
        size, memory = SIZES[on.type]
        for dtype in dtypes | {torch.float32}:
            name = str(dtype).removeprefix("torch.")
            for n in (size // 4, size):
                # Random, as the cases' tensors: GPUs clock higher on ones, whose bits never change.
                a, b, c = (torch.randn(n, n, device=on).to(dtype) for _ in range(3))
                best = self._best(lambda a=a, b=b, c=c: torch.mm(a, b, out=c))
                self.gemm[name] = max(self.gemm.get(name, 0.0), 2 * n**3 / best)
                if best > EMULATED_SECONDS:
                    break
        big = torch.ones(memory // 4, device=on)
        half, other = big[: big.numel() // 2], big[big.numel() // 2 :]
        read = memory / self._best(lambda: torch.sum(big))
        copied = memory / self._best(lambda: half.copy_(other))
        self.memory = max(self.memory, read, copied)
        if on.type == "cpu":
            self.fma = max(self.fma, fma_flops(torch.get_num_threads()))

    def _best(self, run) -> float:
        """The shortest of some; a GPU wakes up first."""
        call = {"": Call(run, lambda _: {})}
        times = 4 if self._device.torch_device.type == "cpu" else 20
        return min(self._device.times(call, cold=False)[""] for _ in range(times))

    def flops(self, dtype: str) -> float:
        """FLOP/s that no kernel should exceed. 16-bit kernels may widen to fp32."""
        return max(self.gemm[dtype], self.gemm["float32"], self.fma)

    def floor(self, result: dict) -> tuple[float, str] | None:
        """The least seconds a result's work can take, and what limits it; None where nothing does.

        None also before the ceilings were measured.
        """
        flops, moved = result["flops"], result["moved_bytes"]
        if not (flops or moved) or not self.memory:
            return None
        streamed = result.get("streaming_seconds", moved / self.memory)
        return max((flops / self.flops(result["dtype"]), "compute"), (streamed, "memory"))

    def resume(self, found: dict) -> None:
        """Begin with what an earlier part of the run has measured."""
        self.gemm = dict(found["gemm_flops"])
        self.fma, self.memory = found["fma_flops"], found["memory_bytes"]

    def document(self) -> dict:
        return {"gemm_flops": self.gemm, "fma_flops": self.fma, "memory_bytes": self.memory}


def streaming(case: Case) -> Call:
    """The plainest thing that moves the case's bytes as it does, by torch's threads."""
    numbers = torch.ones(int(case.moved_bytes) // torch.float32.itemsize)
    half = numbers[: numbers.numel() // 2]
    runs = {
        "read": lambda: torch.sum(numbers),
        "copied": lambda: half.copy_(numbers[half.numel() :][: half.numel()]),
        "rewritten": lambda: half.mul_(1.0),
    }
    return Call(runs[case.streaming], lambda _: {})


def fma_flops(threads: int) -> float:
    """FLOP/s of `threads` cores' registers; 0 where there is no compiler."""
    library = fma_library()
    if library is None:
        return 0.0

    def work(number: int) -> tuple[float, float, float]:
        if len(CORES) >= threads:  # a thread of its own has its own affinity
            os.sched_setaffinity(0, {CORES[number]})
        value = ctypes.c_float(0.0)
        start = time.perf_counter()
        flops = library.fma_probe(ctypes.c_long(FMA_ROUNDS), ctypes.byref(value))
        return flops, start, time.perf_counter()

    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(work, range(threads)))
    return sum(flops / (end - start) for flops, start, end in done)


@functools.cache
def fma_library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    BUILT.mkdir(exist_ok=True)
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    if os.environ.get("FASTATTN_CPU_ISA") == "avx2":  # held to it: the ceiling is, too
        flags.append("-mno-avx512f")
    stamp = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:12]
    library = BUILT / f"fma_probe-{stamp}.so"
    if not library.exists():
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    found = ctypes.CDLL(str(library))
    found.fma_probe.restype = ctypes.c_double
    return found


def pin_threads(threads: int | None) -> int:
    """torch's threads, one a core. (`benchmarks/__main__.py` has OpenMP bind them.)"""
    threads = threads or len(CORES) or os.cpu_count() or 1
    torch.set_num_threads(threads)
    return threads
