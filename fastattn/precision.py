"""In how many bits a training step computes: 32, or 16 under autocast with weights in fp32."""

from __future__ import annotations

from typing import Literal

import torch

from . import library

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fastest(device: torch.device) -> Precision:
    """What a training step is fastest in.

    On a GPU what its tensor cores take: bf16 from sm_80 on, fp16 on sm_70 and sm_75. On a CPU bf16
    where products of it run at twice the rate of fp32's, as on AMD's with AVX512-BF16 (a step of
    the demo's model took 60 ms for 89); elsewhere they take as long as fp32's or longer. Matrix
    tiles (AMX) may be an exception: that was not measured.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    fast = device.type == "cpu" and library.load_error() is None
    return "bf16" if fast and library.cpu_isa() == "avx512_bf16" else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    dtype = DTYPES[precision] if precision != "fp32" else None
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Keeps small gradients of fp16 above zero; does nothing in other precisions, which reach
    down as far as fp32.

    Micikevicius et al., "Mixed Precision Training" (2018).
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def note(precision: Precision, device: torch.device) -> str:
    if precision == "fp32":
        return "fp32"
    scaled = ", gradients scaled" if precision == "fp16" else ""
    return f"{precision} autocast, fp32 weights{scaled}"
