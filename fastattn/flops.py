"""FLOPs of attention, peaks of devices, and MFU: shared by the trainer and the benchmarks.

Model FLOPs utilisation (MFU) is the FLOPs a model needs in theory for the tokens it processed a
second, over the device's peak: it counts no recomputation (Chowdhery et al., "PaLM", 2022,
appendix B). The model's share is `GPT.flops_per_token`; this module knows the rest.
"""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import numpy as np
import torch

# Dense peaks of tensor cores in bf16 (fp16 on sm_75), FLOP/s, from NVIDIA's data sheets. First
# match wins, so a variant stands before its family. What isn't here is unknown, and prints n/a.
GPU_PEAKS = (
    (r"\bB200\b", 2250e12),
    (r"\bH200\b|\bGH200\b", 989.4e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100\b|\bH800\b", 989.4e12),
    (r"\bH20\b", 148e12),
    (r"\bA100\b|\bA800\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090\b(?! D)", 165.2e12),
    (r"\bRTX 3090\b(?! Ti)", 71e12),
    (r"\bT4\b", 65e12),
)


class Peak(NamedTuple):
    """FLOP/s that a device can do at best, and how we know."""

    flops: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """The peak for matrix products of `dtype`; None where it is unknown.

    A GPU's 16-bit peak stands in a table, its fp32 rate depends on switches and is not given. A
    CPU's is measured with torch's threads: a tenth of a second.
    """
    if device.type == "cpu":
        return measured_cpu_peak(dtype)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return gpu_peak(torch.cuda.get_device_name(device))
    return None


def gpu_peak(name: str) -> Peak | None:
    """The 16-bit dense peak of a GPU by the name its driver gives it."""
    for pattern, flops in GPU_PEAKS:
        if re.search(pattern, name):
            return Peak(flops, f"{name}'s data sheet, dense")
    return None


def measured_cpu_peak(dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.1) -> Peak | None:
    """The fastest square matrix product that torch makes within `seconds`.

    None where the two best runs disagree: then other work kept the machine busy, the peak would
    come out too low, and a utilisation made from it too high.
    """
    a = torch.ones((size, size), dtype=dtype)
    b = torch.ones((size, size), dtype=dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)  # threads and buffers
    durations: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(durations) < 3:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        durations.append(time.perf_counter() - start)
    best = settled_best(durations)
    if best is None:
        return None
    name = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    return Peak(2 * size**3 / best, f"{name} {size}³ matrix product measured on {threads} threads")


def settled_best(durations: list[float]) -> float | None:
    """The shortest of several runs, or None if the runner-up took a tenth longer."""
    best, second = sorted(durations)[:2]
    return None if second > 1.1 * best else best


def visible_pairs(seqlen_q: int, seqlen_k: int, window: tuple[int, int] = (-1, -1)) -> int:
    """(query, key) pairs that a head sees; causal is the window (-1, 0), bottom-right aligned."""
    left, right = (seqlen_q + seqlen_k if side < 0 else side for side in window)
    position = np.arange(seqlen_q) + seqlen_k - seqlen_q  # the key each query stands on
    first = np.maximum(position - left, 0)
    last = np.minimum(position + right, seqlen_k - 1)
    return int(np.maximum(last - first + 1, 0).sum())


def attention_flops(
    batch: int,
    heads: int,
    pairs: int,
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    backward: bool = False,
) -> int:
    """FLOPs of the matrix products over `pairs` a head: 2 in the forward pass, 5 in the backward.

    Forward is QKᵀ and PV. Backward is QKᵀ again, dP = dO·Vᵀ, dV = Pᵀ·dO, dQ = dS·K and dK = dSᵀ·Q
    (Dao et al., "FlashAttention", 2022).
    """
    dv = head_dim if head_dim_v is None else head_dim_v
    products = 3 * head_dim + 2 * dv if backward else head_dim + dv
    return 2 * batch * heads * pairs * products
