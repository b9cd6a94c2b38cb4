"""Attention of other packages: flash-attn 2, 3 and 4, xFormers, FlashInfer. An adapter each.

Their causal masks are aligned bottom-right, as ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import DROPOUT, SOFTCAP, Attention
from .attention_peers import SUITES, attention_call
from .case import Call, Case, Inputs, Peer

HALVES = (torch.bfloat16, torch.float16)


def flash_attn_2(case: Case, inputs: Inputs) -> Call:
    from flash_attn import flash_attn_interface

    assert isinstance(case, Attention)
    options: dict[str, Any] = {"causal": case.causal, "window_size": (case.window, 0)}
    if case.window < 0:
        options["window_size"] = (-1, -1)
    if case.extra == "softcap":
        options["softcap"] = SOFTCAP
    if case.extra == "alibi":
        options["alibi_slopes"] = inputs["alibi_slopes"]
    if case.extra == "dropout":
        options["dropout_p"] = DROPOUT
    return flash_call(case, inputs, flash_attn_interface, options)


def flash_attn_3(case: Case, inputs: Inputs) -> Call:
    import flash_attn_interface

    assert isinstance(case, Attention)
    options: dict[str, Any] = {"causal": case.causal}
    if case.window >= 0:
        options["window_size"] = (case.window, 0)
    if case.extra == "softcap":
        options["softcap"] = SOFTCAP
    return flash_call(case, inputs, flash_attn_interface, options)


def flash_attn_4(case: Case, inputs: Inputs) -> Call:
    from flash_attn import cute

    assert isinstance(case, Attention)
    options: dict[str, Any] = {"causal": case.causal}
    if case.window >= 0:
        options["window_size"] = (case.window, 0)
    if case.extra == "softcap":
        options["softcap"] = SOFTCAP
    return flash_call(case, inputs, cute, options)


def flash_call(case: Attention, inputs: Inputs, package: Any, options: dict[str, Any]) -> Call:
    """The three share names and layouts; some return (out, lse)."""

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        if sinks is not None:  # flash-attn 4's alone
            options["learnable_sink"] = sinks
        if case.lengths:
            for side in "qk":  # by name: flash-attn 4 has another argument behind v
                options[f"cu_seqlens_{side}"] = inputs["cu_seqlens"]
                options[f"max_seqlen_{side}"] = max(case.lengths)
            out = package.flash_attn_varlen_func(q, k, v, **options)
        else:
            out = package.flash_attn_func(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return attention_call(case, inputs, run, "thd" if case.lengths else "bshd")


def xformers(case: Case, inputs: Inputs) -> Call:
    from xformers.ops import fmha, memory_efficient_attention

    assert isinstance(case, Attention)
    bias: Any = None
    if case.lengths:
        kind = fmha.attn_bias.BlockDiagonalMask
        bias = kind.from_seqlens(list(case.lengths))
        bias = bias.make_causal() if case.causal else bias
    elif case.window >= 0:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(case.window + 1)
    elif case.causal:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = DROPOUT if case.extra == "dropout" else 0.0
        return memory_efficient_attention(q, k, v, attn_bias=bias, p=p)

    return attention_call(case, inputs, run)


def flashinfer(case: Case, inputs: Inputs) -> Call:
    """Its prefill over ragged batches, planned beforehand."""
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    assert isinstance(case, Attention)
    device, rows = inputs["q"].device, case.batch * case.seqlen
    ends = inputs.get("cu_seqlens")
    if ends is None:
        ends = torch.arange(0, rows + 1, case.seqlen, dtype=torch.int32, device=device)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    kv_heads, dv = case.heads // case.group_size, case.head_dim_v or case.head_dim
    wrapper.plan(
        *(ends, ends, case.heads, kv_heads, case.head_dim),
        head_dim_vo=dv,
        causal=case.causal,
        window_left=case.window,
        logits_soft_cap=SOFTCAP if case.extra == "softcap" else 0.0,
        q_data_type=case.dtype,
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = wrapper.run(*(x.reshape(rows, *x.shape[-2:]) for x in (q, k, v)))
        return out.view(*q.shape[:-1], dv)

    return attention_call(case, inputs, run)


def has(words: str) -> frozenset[str]:
    return frozenset(words.split(","))


GPU_HALVES = {"suites": SUITES, "devices": ("cuda",), "dtypes": HALVES}
PEERS = [
    Peer(
        name="flash-attn 2",
        module="flash_attn.flash_attn_interface",  # flash_attn alone may be flash-attn 4
        prepare=flash_attn_2,
        features=has("backward,window,grouped heads,packed sequences,softcap,alibi,dropout"),
        **GPU_HALVES,
    ),
    Peer(
        name="flash-attn 3",
        module="flash_attn_interface",
        prepare=flash_attn_3,
        features=has("backward,window,grouped heads,packed sequences,softcap"),
        **GPU_HALVES,
    ),
    Peer(
        name="flash-attn 4",
        module="flash_attn.cute",
        prepare=flash_attn_4,
        features=has("backward,window,grouped heads,another D of v,packed sequences,softcap,sinks"),
        compiles=True,
        **GPU_HALVES,
    ),
    Peer(
        name="xFormers",
        module="xformers.ops",
        prepare=xformers,
        features=has("backward,window,another D of v,packed sequences,dropout"),
        **GPU_HALVES,
    ),
    Peer(
        name="FlashInfer",
        module="flashinfer",
        prepare=flashinfer,
        features=has("window,grouped heads,another D of v,packed sequences,softcap"),
        compiles=True,
        **GPU_HALVES,
    ),
]
