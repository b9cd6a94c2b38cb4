"""Finds and loads the compiled libraries, each once, on first use.

`_C.abi3.so` has the CPU kernels, `_cuda.abi3.so` the CUDA kernels. FASTATTN_LIBRARY and
FASTATTN_CUDA_LIBRARY name other files to load in their place, such as one built with sanitizers;
FASTATTN_EMULATE names a library of the CUDA kernels built for the emulator.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

INTERFACE = 3  # of the libraries' operators, as csrc/bindings.cpp counts them


@functools.cache
def load_error() -> str | None:
    """Load the CPU kernels; None, or the reason why they can't be."""
    file = _find("_C*.so", "FASTATTN_LIBRARY")
    if file is None:
        return (
            "fastattn/_C*.so is missing: the package was installed without its kernels"
            " (install torch and a C++17 compiler, then `pip install --no-build-isolation`)"
        )
    return _load(file, "fastattn_C")


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """What the CPU kernels use, and behind it what FASTATTN_CPU_ISA could force here: of
    avx512_bf16, avx512, avx2 and scalar.

    Raises RuntimeError naming the usable ones if the forced one is not usable.
    """
    if (reason := load_error()) is not None:
        raise RuntimeError(reason)
    return tuple(torch.ops.fastattn_C.instruction_sets().split(";"))


def cpu_isa() -> str:
    """The instruction set the CPU kernels use. Raises as `instruction_sets` does."""
    return instruction_sets()[0]


def cuda_load_error() -> str | None:
    """Load the CUDA kernels, or the emulator's; None, or the reason why they can't be."""
    if emulated():
        return _load(Path(os.environ["FASTATTN_EMULATE"]).resolve(), "fastattn_emulated")
    file = cuda_file()
    if file is None:
        return (
            "fastattn/_cuda*.so is missing: the package was installed without its CUDA kernels"
            " (install nvcc, then `FASTATTN_CUDA=1 pip install --no-build-isolation`)"
        )
    return _load(file, "fastattn_cuda")


@functools.cache
def cuda_architectures() -> tuple[int, ...]:
    """What the loaded CUDA kernels are built for, as 75, 80, 90 …; PTX of the last of them too."""
    return tuple(sorted(int(a) for a in torch.ops.fastattn_cuda.architectures().split(";")))


def cuda_file() -> Path | None:
    return _find("_cuda*.so", "FASTATTN_CUDA_LIBRARY")


def emulated() -> bool:
    """The CUDA kernels of this process run in the emulator."""
    return bool(os.environ.get("FASTATTN_EMULATE"))


def _find(pattern: str, variable: str) -> Path | None:
    if named := os.environ.get(variable):
        return Path(named).resolve()
    return min(Path(__file__).parent.glob(pattern), default=None)


@functools.cache
def _load(file: Path, namespace: str) -> str | None:
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        return f"{file.name} could not be loaded: {error.__cause__ or error}"
    interface = getattr(getattr(torch.ops, namespace), "interface", None)
    if interface is None or (found := interface()) != INTERFACE:
        count = "" if interface is None else f" (interface {found}, not {INTERFACE})"
        return (
            f"{file.name} was built from other sources than this package's{count}: build it again"
            " (`make build`, or `pip install --no-build-isolation`)"
        )
    return None
