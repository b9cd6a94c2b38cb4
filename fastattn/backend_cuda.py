"""The CUDA kernels' row in the backend table: `_cuda`, the library of csrc/cuda.

Where FASTATTN_EMULATE names a library of the same kernels built for the emulator (tests/emulated.py
builds it), they run on CPU tensors, thousands of times slower, for whoever asks for this backend.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from . import files, library, proof
from .backends import KERNEL_DTYPES, Problem
from .compiled import Compiled
from .problem import AttentionProblem, QKVGradients

_compiled = Compiled(
    lambda: torch.ops.fastattn_emulated if library.emulated() else torch.ops.fastattn_cuda
)
attn_fwd = _compiled.attn_fwd
attn_entropy = _compiled.attn_entropy
attn_decode = _compiled.attn_decode
cross_entropy_fwd = _compiled.cross_entropy_fwd
cross_entropy_bwd = _compiled.cross_entropy_bwd


def attn_bwd(
    p: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    deterministic: bool,
    into: QKVGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Atomics add up the gradient of a bias that several scores share, in no fixed order. To be
    deterministic it is first made for every score, in B · H_q · S_q · S_k floats. On Hopper blocks
    of keys add to dq in any order; to be deterministic they take turns."""
    bias = p.bias
    if deterministic and bias is not None:
        p = p._replace(bias=bias.float().expand(p.scores_shape))
    dq, dk, dv, dbias, dsinks = _compiled.attn_bwd(p, out, lse, dout, dlse, deterministic, into)
    if bias is not None and dbias is not None:
        dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk, dv, dbias, dsinks


def unusable() -> str | None:
    if not library.emulated():
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
    return library.cuda_load_error()


def refuses(p: Problem, asked: bool) -> str | None:
    first = p[0]
    if not library.emulated():
        if first.device.type != "cuda":
            return f"the tensors are on {first.device}, not a CUDA device"
    elif not asked:
        return "here it runs in the emulator, only if asked for by name"
    elif first.is_cuda:
        return f"the tensors are on {first.device}, and the emulator takes those on the CPU"
    target = arch(first)
    reason = (None if library.emulated() else _no_image(target)) or _no_kernel(p, target)
    return reason or (None if asked else proof.missing("cuda", p))


@functools.cache
def fingerprint() -> str:
    file = library.cuda_file()
    assert file is not None
    return files.sha256_of(file)


def remark(p: Problem) -> str | None:
    """What kernels take a problem that isn't for those one would think of."""
    if not isinstance(p, AttentionProblem):
        return None
    remarks = []
    if _decodes(p):
        remarks.append("forward by the kernels for decoding, which split keys among blocks")
    if arch(p.q) == 90 and p.q.dtype != torch.float32:
        reason = _not_hoppers(p)
        passes = "backward" if remarks else "forward and backward"
        remarks.append(f"{passes} by {reason or 'wgmma and TMA'}")
    return "; ".join(remarks) or None


def _decodes(p: AttentionProblem) -> bool:
    """As csrc/cuda/attn_fwd.cu decides."""
    batch, heads_q, seqlen_q, seqlen_k = p.scores_shape
    narrow = max(p.q.shape[-1], p.v.shape[-1]) <= 128
    rich = p.mask is not None or p.bias is not None or p.dropout_p > 0
    by_products = narrow and p.q.dtype != torch.float32 and all(map(_has_vectors, (p.q, p.k, p.v)))
    if seqlen_k < 512 or (rich and not by_products):
        return False
    rows = heads_q // p.k.shape[-2] * seqlen_q
    tiles = batch * heads_q * -(-seqlen_q // 128)
    idle = 2 * tiles <= _multiprocessors(p.q)
    return rows <= 16 or (rows <= 512 and narrow and idle)


def _has_vectors(t: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes and are of 8 elements or a multiple."""
    strides = (stride * t.element_size() for stride in t.stride()[:-1])
    return t.data_ptr() % 16 == 0 and t.shape[-1] % 8 == 0 and all(s % 16 == 0 for s in strides)


def _multiprocessors(t: Tensor) -> int:
    if library.emulated():
        return 8  # csrc/cuda/device.cu
    return torch.cuda.get_device_properties(t.device).multi_processor_count


def _not_hoppers(p: AttentionProblem) -> str | None:
    """Whose a problem is on Hopper instead, and why; csrc/cuda/tensor_map.cu decides."""
    if not library.emulated() and 90 not in library.cuda_architectures():
        return "the kernels of sm_80, as the library isn't built for sm_90"
    for name, t in (("q", p.q), ("k", p.k), ("v", p.v)):
        sizes_and_strides = zip(t.shape[:-1], t.stride()[:-1], strict=True)
        if t.numel() == 0:
            reason = "it is empty"
        elif t.data_ptr() % 16 != 0:
            reason = "it isn't aligned to 16 bytes"
        elif any(n > 1 and (stride <= 0 or stride % 8 != 0) for n, stride in sizes_and_strides):
            reason = f"of strides {t.stride()} one is no positive multiple of 8"
        else:
            continue
        return f"the kernels of sm_80, as TMA can't copy {name}: {reason}"
    return None


def arch(t: Tensor) -> int:
    """Of t's device, as compute capability · 10: 75, 80, 86, 89, 90, 100, 120."""
    if library.emulated():
        return int(os.environ.get("FASTATTN_EMULATE_ARCH", "80"))
    major, minor = torch.cuda.get_device_capability(t.device)
    return 10 * major + minor


@functools.cache
def _no_image(arch: int) -> str | None:
    """Machine code runs on devices of its major version and at least its minor one, PTX on any
    later device; but later ones than sm_75 take sm_80's kernels."""
    built = library.cuda_architectures()
    if any(b // 10 == arch // 10 and b <= arch for b in built) or arch > max(built) >= 80:
        return None
    return f"the library is built for {', '.join(f'sm_{b}' for b in built)}, not for sm_{arch}"


def _no_kernel(p: Problem, arch: int) -> str | None:
    dtype = p[0].dtype
    if dtype not in KERNEL_DTYPES:
        return f"dtype {dtype} has no kernel, only float32, bfloat16 and float16 have"
    if isinstance(p, AttentionProblem) and dtype == torch.bfloat16 and arch < 80:
        return f"sm_{arch} has no tensor core products of bfloat16; float16 has a kernel"
    return None
