"""How fastattn and torch do attention.

Every peer gets the same values in the layout it likes best: (B, S, H, D) contiguous for fastattn,
(B, H, S, D) for torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .attention import DROPOUT, SOFTCAP, Attention
from .case import Call, Case, Inputs, Peer, our_peers

SUITES = frozenset({"attention-fwd", "attention-bwd", "varlen", "features"})

Function = Callable[..., Tensor]  # (q, k, v, bias, sinks) → out, in the peer's layout


def attention_call(case: Case, inputs: Inputs, function: Function, layout: str = "bshd") -> Call:
    """Times `function` on the case's tensors in its layout: bshd, bhsd, or thd of packed ones."""
    assert isinstance(case, Attention)

    def theirs(x: Tensor) -> Tensor:
        if layout == "thd":
            return x[0].contiguous()
        return x.transpose(1, 2).contiguous() if layout == "bhsd" else x.contiguous()

    def bshd(x: Tensor) -> Tensor:
        return x[None] if layout == "thd" else x.transpose(1, 2) if layout == "bhsd" else x

    leaves = {name: theirs(inputs[name]) for name in ("q", "k", "v")}
    leaves |= {name: inputs[name] for name in ("bias", "sinks") if name in inputs}
    if case.passes == "fwd":
        forward = torch.no_grad()(lambda: function(**leaves))
        return Call(forward, lambda out: {"out": bshd(out)})
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    dout, graph = theirs(inputs["dout"]), []

    def forward_pass() -> None:
        graph[:] = [function(**leaves)]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(graph.pop(), tuple(leaves.values()), dout)

    def both() -> tuple[Tensor, ...]:
        forward_pass()
        return backward()

    def results(grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
        named = dict(zip((f"d{name}" for name in leaves), grads, strict=True))
        return {n: bshd(g) if n in ("dq", "dk", "dv") else g for n, g in named.items()}

    return (
        Call(both, results) if case.passes == "fwd+bwd" else Call(backward, results, forward_pass)
    )


def ours(backend: str) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        assert isinstance(case, Attention)
        options = {n: inputs[n] for n in ("mask", "alibi_slopes") if n in inputs}
        options |= {"window": case.span, "backend": backend}
        options |= {"softcap": SOFTCAP} if case.extra == "softcap" else {}
        options |= {"dropout_p": DROPOUT} if case.extra == "dropout" else {}
        if case.lengths:
            ends, longest = inputs["cu_seqlens"], max(case.lengths)

            def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return fastattn.attention_varlen(q, k, v, ends, ends, longest, longest, **options)

            return attention_call(case, inputs, packed, "thd")

        def dense(q: Tensor, k: Tensor, v: Tensor, **more: Tensor) -> Tensor:
            return fastattn.attention(q, k, v, **options, **more)

        return attention_call(case, inputs, dense)

    return prepare


ALL = frozenset({"backward", "window", "grouped heads", "another D of v", "packed sequences"})
ALL |= {"softcap", "mask", "bias", "alibi", "sinks", "dropout"}


def score_mask(case: Attention, inputs: Inputs) -> Tensor | None:
    """What torch's SDPA can only take as a whole mask or bias, made beforehand."""
    S, device = case.seqlen, inputs["q"].device
    position = torch.arange(S, device=device)
    distance = position[:, None] - position  # (S_q, S_k)
    if case.window >= 0:
        return (distance >= 0) & (distance <= case.window)
    if case.extra == "alibi":
        bias = -inputs["alibi_slopes"][:, None, None] * distance
        bias = bias.masked_fill(distance < 0, -math.inf) if case.causal else bias
        return bias.to(case.dtype)[None]
    return inputs.get("mask")


def sdpa(context: Callable | None = None) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        assert isinstance(case, Attention)
        mask = score_mask(case, inputs)
        options = {
            "is_causal": case.causal and mask is None,
            "dropout_p": DROPOUT if case.extra == "dropout" else 0.0,
            "enable_gqa": case.group_size > 1,
        }
        if case.lengths:
            return sdpa_a_sequence(case, inputs)

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            added = mask if bias is None else bias
            if context is None:
                return F.scaled_dot_product_attention(q, k, v, added, **options)
            with context():
                return F.scaled_dot_product_attention(q, k, v, added, **options)

        return attention_call(case, inputs, run, "bhsd")

    return prepare


def sdpa_a_sequence(case: Attention, inputs: Inputs) -> Call:
    """Packed sequences as a user of SDPA has them: a call each."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(case.lengths, 2) for x in (q, k, v)), strict=True)
        causal, gqa = case.causal, case.group_size > 1
        return torch.cat(
            [F.scaled_dot_product_attention(*p, is_causal=causal, enable_gqa=gqa) for p in parts],
            2,
        )

    return attention_call(case, inputs, run, "bhsd")


def textbook(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(B, H, S, D), each step in the inputs' dtype, as many write it: torch.compile's to fuse."""
    s = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        S = s.shape[-1]
        unseen = torch.ones(S, S, dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(unseen, -math.inf)
    return torch.softmax(s, -1) @ v


def compiled_textbook(case: Case, inputs: Inputs) -> Call:
    assert isinstance(case, Attention)
    compiled = torch.compile(textbook, dynamic=False)
    return attention_call(
        case, inputs, lambda q, k, v: compiled(q, k, v, case.causal), layout="bhsd"
    )


def flex(case: Case, inputs: Inputs) -> Call:
    """FlexAttention, compiled, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert isinstance(case, Attention)
    device = inputs["q"].device
    document = None
    if case.lengths:
        lengths = torch.tensor(case.lengths, device=device)
        document = torch.arange(len(case.lengths), device=device).repeat_interleave(lengths)

    def visible(b, h, i, j):
        seen = j >= 0
        if case.causal:
            seen = seen & (i >= j)
        if case.window >= 0:
            seen = seen & (i - j <= case.window)
        if document is not None:
            seen = seen & (document[i] == document[j])
        return seen & mask[0, 0, i, j] if case.extra == "mask" else seen

    mask, slopes = inputs.get("mask"), inputs.get("alibi_slopes")
    plain = not (case.causal or case.lengths or case.extra == "mask")
    block_mask = None
    if not plain:
        block_mask = create_block_mask(visible, None, None, case.seqlen, case.seqlen, device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        def score(s, b, h, i, j):
            if case.extra == "softcap":
                return SOFTCAP * torch.tanh(s / SOFTCAP)
            if case.extra == "alibi":
                return s - slopes[h] * (i - j).abs()
            return s + bias[0, h, i, j]

        score_mod = score if case.extra in ("softcap", "alibi", "bias") else None
        gqa = case.group_size > 1
        return compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa)

    return attention_call(case, inputs, run, "bhsd")


def torch_varlen(case: Case, inputs: Inputs) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    assert isinstance(case, Attention)
    ends, longest = inputs["cu_seqlens"], max(case.lengths)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=case.span)

    return attention_call(case, inputs, run, "thd")


def torch_peers() -> list[Peer]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    most = ALL - {"softcap", "sinks"}
    peers = [Peer(name="torch SDPA", suites=SUITES | {"ladder"}, prepare=sdpa(), features=most)]
    forced = {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    for name, backend in forced.items():
        peers.append(
            Peer(
                name=f"torch SDPA {name}",
                suites=SUITES,
                prepare=sdpa(lambda backend=backend: sdpa_kernel(backend)),
                features=most - {"packed sequences"},
                devices=("cpu", "cuda") if name == "math" else ("cuda",),
            )
        )
    compiled = {"suites": SUITES, "compiles": True}
    return [
        *peers,
        Peer(
            name="torch.compile",
            prepare=compiled_textbook,
            features=frozenset({"backward", "another D of v"}),
            **compiled,
        ),
        Peer(
            name="FlexAttention",
            prepare=flex,
            features=ALL - {"sinks", "dropout"},
            unfit=lambda case: flex_unfit(case),
            **compiled,
        ),
        Peer(
            name="torch varlen_attn",
            module="torch.nn.attention.varlen",
            suites=frozenset({"varlen"}),
            prepare=torch_varlen,
            devices=("cuda",),
            dtypes=(torch.bfloat16, torch.float16),
            features=frozenset({"packed sequences", "backward"}),
        ),
    ]


def flex_unfit(case: Case) -> str | None:
    assert isinstance(case, Attention)
    return f"D {case.head_dim} is below 16" if case.head_dim < 16 else None


PEERS = [*our_peers(SUITES | {"ladder"}, ours, ALL), *torch_peers()]
