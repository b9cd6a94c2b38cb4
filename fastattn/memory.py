"""How much memory a call needs: what this process, or the CUDA device, held at most during it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def peak_memory(function: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Bytes held at most during a call, above those before it; None for a CPU off Linux."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        release_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark VmHWM to VmRSS
        before = resident("VmHWM")
        function()
        return resident("VmHWM") - before
    except OSError:
        return None


def release_free_memory() -> None:
    """Give back what malloc keeps for later, so that a call which reuses it counts it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(name: str) -> int:
    """VmRSS or VmHWM, the memory held now or at most, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
