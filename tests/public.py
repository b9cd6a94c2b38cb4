"""The public functions as functions of a problem, as fastattn.testing's checks take them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import fastattn
from fastattn import backends
from fastattn.problem import AttentionProblem, CrossEntropyProblem, DecodeProblem

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 1234


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def drawn_seed() -> Tensor:
    """The Philox key that `attention` draws first after torch.manual_seed(SEED)."""
    torch.manual_seed(SEED)
    return torch.randint(2**63 - 1, ())


def refusal(p: backends.Problem, backend: str | None) -> str | None:
    """sm_75 has no attention in bfloat16, as tests/test_cuda.py says."""
    rows = (row for row in backends.TABLE if row.name == backend == "cuda")
    return next((row.refuses(p, asked=True) for row in rows), None)


def skip_if_refused(p: backends.Problem, backend: str | None) -> None:
    if (reason := refusal(p, backend)) is not None:
        import pytest  # gpu/cases.py does without

        pytest.skip(reason)


def attention(p: AttentionProblem, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of the public function. It draws drawn_seed(), which p.seed should be."""
    skip_if_refused(p, backend)
    causal = p.window_right == 0
    options = {
        "causal": causal,
        "window": (p.window_left, -1 if causal else p.window_right),
        "scale": p.scale,
        "softcap": p.softcap,
        "mask": p.mask,
        "bias": p.bias,
        "alibi_slopes": p.alibi_slopes,
        "sinks": p.sinks,
        "dropout_p": p.dropout_p,
        "return_lse": True,
        "backend": backend,
    }
    torch.manual_seed(SEED)
    if not p.packed:
        return fastattn.attention(p.q, p.k, p.v, **options)
    offsets = (p.cu_seqlens_q, p.cu_seqlens_k, p.max_seqlen_q, p.max_seqlen_k)
    return fastattn.attention_varlen(p.q, p.k, p.v, *offsets, **options)


def attention_on(backend: str) -> Callable[[AttentionProblem], tuple[Tensor, Tensor]]:
    return functools.partial(attention, backend=backend)


def decode(p: DecodeProblem, backend: str | None = None) -> tuple[Tensor, Tensor]:
    options = p._asdict()
    q, k_cache, v_cache = (options.pop(name) for name in ("q", "k_cache", "v_cache"))
    window = (options.pop("window_left"), options.pop("window_right"))
    return fastattn.attention_decode(
        q, k_cache, v_cache, **options, window=window, return_lse=True, backend=backend
    )


def cross_entropy(p: CrossEntropyProblem, backend: str | None = None) -> tuple[Tensor, Tensor]:
    options = p._asdict()
    logits, target = options.pop("logits"), options.pop("target")
    return fastattn.cross_entropy(
        logits, target, **options, reduction="none", return_lse=True, backend=backend
    )
