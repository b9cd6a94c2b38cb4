"""The Triton kernels' row in the backend table: kernels/, compiled on first use for the GPU.

With TRITON_INTERPRET=1 in the environment when triton is first imported, Triton's interpreter runs
them on CPU tensors, thousands of times slower, for whoever asks for this backend.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import proof
from .backends import KERNEL_DTYPES, Problem
from .problem import (
    AttentionProblem,
    CrossEntropyProblem,
    DecodeProblem,
    LinearCrossEntropyProblem,
    QKVGradients,
)


def unusable() -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1" and not _has_gpu():
        return "there is no GPU"  # said without importing triton
    return _no_triton()


@functools.cache
def _has_gpu() -> bool:
    """Asking the driver takes microseconds, and this is asked at every call."""
    return torch.cuda.is_available()


@functools.cache
def _no_triton() -> str | None:
    try:
        _kernels("interpreter")
    except ImportError as error:
        return f"triton can't be used: {error}"
    return None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is then mended."""
    interpreter = _kernels("interpreter")
    if not interpreter.running():
        return False
    interpreter.mend()
    return True


def refuses(p: Problem, asked: bool) -> str | None:
    first = p[0]
    if first.dtype not in KERNEL_DTYPES:
        return f"dtype {first.dtype} has no kernel, only float32, bfloat16 and float16 have"
    if interpreted():
        if not asked:
            return "here it runs in Triton's interpreter, only if asked for by name"
        if first.device.type != "cpu":
            return f"the tensors are on {first.device}, and the interpreter takes those on the CPU"
        return None
    if first.device.type != "cuda":
        return f"the tensors are on {first.device}, not a GPU"
    return _unfit(first.device) or (None if asked else proof.missing("triton", p))


@functools.cache
def fingerprint() -> str:
    """Of the kernels' sources and the compiler."""
    folder = Path(str(_kernels("interpreter").__file__)).parent
    sources = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    return f"triton {metadata.version('triton')} {hashlib.sha256(sources).hexdigest()}"


@functools.cache
def _unfit(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "its tiles are for NVIDIA's GPUs, and it has not been tried on AMD's"
    if torch.version.cuda is not None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"Triton has no tensor core products for sm_{major}{minor}, only from sm_80 on"
    return None


@functools.cache
def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f".kernels.{module}", __package__)


_HERE: contextlib.AbstractContextManager = contextlib.nullcontext()


def _on_device_of(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; changing it takes a microsecond."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return _HERE


def attn_fwd(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    with _on_device_of(p.q):
        return _kernels("attention_fwd").attn_fwd(p)


def attn_entropy(p: AttentionProblem, lse: Tensor) -> Tensor:
    with _on_device_of(p.q):
        return _kernels("attention_entropy").attn_entropy(p, lse)


def attn_bwd(
    p: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    deterministic: bool,
    into: QKVGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    with _on_device_of(p.q):
        return _kernels("attention_bwd").attn_bwd(p, out, lse, dout, dlse, deterministic, into)


def attn_decode(p: DecodeProblem) -> tuple[Tensor, Tensor]:
    with _on_device_of(p.q):
        return _kernels("attention_decode").attn_decode(p)


def cross_entropy_fwd(
    p: CrossEntropyProblem, dloss: Tensor | None, dlogits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and lse a row; with dlogits (may be the logits) dloss · ∂loss too, in one pass."""
    with _on_device_of(p.logits):
        return _kernels("cross_entropy").cross_entropy_fwd(p, dloss, dlogits)


def cross_entropy_bwd(
    p: CrossEntropyProblem,
    lse: Tensor,
    dloss: Tensor,
    dlse: Tensor | None,
    dlogits: Tensor | None = None,
) -> Tensor:
    """dloss · ∂loss + dlse · ∂lse; written to dlogits (may be the logits) if given."""
    with _on_device_of(p.logits):
        return _kernels("cross_entropy").cross_entropy_bwd(p, dloss, dlse, dlogits)


def linear_cross_entropy_fwd(p: LinearCrossEntropyProblem) -> tuple[Tensor, Tensor]:
    """Loss and lse a row; the logits never reach memory."""
    with _on_device_of(p.x):
        return _kernels("linear_cross_entropy").linear_cross_entropy_fwd(p)
