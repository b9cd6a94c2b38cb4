"""Finds and loads the compiled library `_C.abi3.so`, once, on first use.

FASTATTN_LIBRARY names another file to load in its place, such as one built with sanitizers.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch


@functools.cache
def load_error() -> str | None:
    """Load the library; None, or the reason why it can't be."""
    named = os.environ.get("FASTATTN_LIBRARY")
    candidates = [Path(named).resolve()] if named else sorted(Path(__file__).parent.glob("_C*.so"))
    if not candidates:
        return (
            "fastattn/_C*.so is missing: the package was installed without its kernels"
            " (install torch and a C++17 compiler, then `pip install --no-build-isolation`)"
        )
    try:
        torch.ops.load_library(str(candidates[0]))
    except (OSError, RuntimeError) as error:
        return f"{candidates[0].name} could not be loaded: {error}"
    return None


@functools.cache
def cpu_isa() -> str:
    """The instruction set the CPU kernels use: avx512, avx2 or scalar. FASTATTN_CPU_ISA forces one.

    Raises RuntimeError naming the usable ones if the forced one is not usable.
    """
    if (reason := load_error()) is not None:
        raise RuntimeError(reason)
    return torch.ops.fastattn_C.cpu_isa()
