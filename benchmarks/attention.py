"""Attention, dense and packed: the cases, their exact results, and fastattn's and torch's ways.

Time is of the forward pass (under no_grad), or of the backward pass alone. Every peer gets the same
values in the layout it likes best: (B, S, H, D) contiguous for fastattn, (B, H, S, D) for torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import backends
from fastattn.flops import attention_flops, visible_pairs

from .case import Call, Case, Inputs, Peer, randn

QUERIES_AT_A_TIME = 2048  # of the exact result: fp64 scores are large
SOFTCAP = 20.0
DROPOUT = 0.1
SUITES = frozenset({"attention-fwd", "attention-bwd", "varlen", "features"})

Function = Callable[..., Tensor]  # (q, k, v, bias, sinks) → out, in the peer's layout


@dataclass(frozen=True, kw_only=True)
class Attention(Case):
    """Self-attention. With `lengths`, sequences packed one after another (batch is 1 then)."""

    batch: int
    seqlen: int
    heads: int
    head_dim: int
    kv_heads: int = 0  # 0 = heads
    head_dim_v: int = 0  # 0 = head_dim
    passes: Literal["fwd", "bwd"] = "fwd"
    causal: bool = False
    window: int = -1  # keys to the left; causal
    extra: Literal["", "softcap", "mask", "bias", "alibi", "sinks", "dropout"] = ""
    lengths: tuple[int, ...] = ()

    baseline = "torch SDPA"

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.group_size > 1 else "")
        dims = f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v else "")
        span = f"window {self.window}" if self.window >= 0 else "causal" if self.causal else "full"
        shape = f"B{self.batch} S{self.seqlen}"
        if self.lengths:
            shape = f"{len(self.lengths)} sequences of {min(self.lengths)}–{max(self.lengths)}"
        words = (shape, heads, dims, span, self.extra, self.passes)
        return " ".join(filter(None, words))

    @property
    def group_size(self) -> int:
        return self.heads // (self.kv_heads or self.heads)

    @property
    def features(self) -> frozenset[str]:
        found = {self.extra} if self.extra else set()
        found |= {"backward"} if self.passes == "bwd" else set()
        found |= {"window"} if self.window >= 0 else set()
        found |= {"grouped heads"} if self.group_size > 1 else set()
        found |= {"another D of v"} if self.head_dim_v else set()
        found |= {"packed sequences"} if self.lengths else set()
        return frozenset(found)

    @property
    def span(self) -> tuple[int, int]:
        return (self.window, 0) if self.causal else (-1, -1)

    @property
    def flops(self) -> float:
        backward = self.passes == "bwd"
        pairs = sum(visible_pairs(n, n, self.span) for n in self.lengths or (self.seqlen,))
        return attention_flops(
            self.batch, self.heads, pairs, self.head_dim, self.head_dim_v or None, backward=backward
        )

    @property
    def moved_bytes(self) -> float:
        """q and out, k and v; the backward pass reads them and dout, and writes dq, dk, dv."""
        dv = self.head_dim_v or self.head_dim
        kv_heads = self.heads // self.group_size
        passes = 1 if self.passes == "fwd" else 2
        numbers = passes * (self.heads + kv_heads) * (self.head_dim + dv)
        return numbers * self.batch * self.seqlen * self.dtype.itemsize

    def inputs(self, device: torch.device) -> Inputs:
        g, dtype = self.generator(device), self.dtype
        kv_heads, dv = self.heads // self.group_size, self.head_dim_v or self.head_dim
        rows, S = (self.batch, self.seqlen), self.seqlen
        inputs = {
            "q": randn(g, *rows, self.heads, self.head_dim, dtype=dtype),
            "k": randn(g, *rows, kv_heads, self.head_dim, dtype=dtype),
            "v": randn(g, *rows, kv_heads, dv, dtype=dtype),
            "dout": randn(g, *rows, self.heads, dv, dtype=dtype),
        }
        if self.extra == "bias":
            inputs["bias"] = randn(g, 1, self.heads, S, S, dtype=dtype)
        elif self.extra == "sinks":
            inputs["sinks"] = randn(g, self.heads, dtype=torch.float32)
        elif self.extra == "alibi":
            inputs["alibi_slopes"] = 2.0 ** -torch.linspace(1, 8, self.heads, device=device)
        elif self.extra == "mask":  # whole blocks and single keys, every query sees itself
            blocks = torch.rand(math.ceil(S / 128), math.ceil(S / 128), generator=g, device=device)
            mask = (blocks < 0.5).repeat_interleave(128, 0).repeat_interleave(128, 1)[:S, :S]
            mask = mask & (torch.rand(S, S, generator=g, device=device) < 0.9)
            inputs["mask"] = (mask | torch.eye(S, dtype=torch.bool, device=device))[None, None]
        if self.lengths:
            ends = torch.tensor((0, *self.lengths), device=device)
            inputs["cu_seqlens"] = ends.cumsum(0, dtype=torch.int32)
        return inputs

    # ---- what is right -------------------------------------------------------------------------

    def checked(self) -> list[tuple[int, slice, int]]:
        """(batch, positions, KV head) of the first and the last: dense or packed sequences."""
        last = self.heads // self.group_size - 1
        if self.lengths:
            start = self.seqlen - self.lengths[-1]
            return [(0, slice(0, self.lengths[0]), 0), (0, slice(start, self.seqlen), last)]
        picks = {(0, 0), (self.batch - 1, last)}
        return [(b, slice(0, self.seqlen), h) for b, h in sorted(picks)]

    def query_heads(self, kv_head: int) -> slice:
        return slice(kv_head * self.group_size, (kv_head + 1) * self.group_size)

    def part(self, name: str, x: Tensor, pick: tuple[int, slice, int]) -> Tensor:
        b, positions, h = pick
        if name in ("bias", "dbias"):
            return x[:, self.query_heads(h), positions, positions]
        if name in ("sinks", "dsinks"):
            return x[self.query_heads(h)]
        heads = slice(h, h + 1) if name in ("k", "v", "dk", "dv") else self.query_heads(h)
        return x[b : b + 1, positions, heads]

    def parts(self, name: str, result: Tensor) -> Tensor:
        return torch.cat([self.part(name, result, pick).flatten() for pick in self.checked()])

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        if self.extra == "dropout":
            return {}
        found: dict[str, list[Tensor]] = {}
        for pick in self.checked():
            part = {
                name: self.part(name, inputs[name], pick).double()
                for name in ("q", "k", "v", "dout", "bias", "sinks")
                if name in inputs
            }
            if "mask" in inputs:
                part["mask"] = inputs["mask"]
            if "alibi_slopes" in inputs:
                part["alibi_slopes"] = inputs["alibi_slopes"][self.query_heads(pick[2])]
            for name, x in exact_attention(self, part).items():
                found.setdefault(name, []).append(x.flatten())
        return {name: torch.cat(xs) for name, xs in found.items()}


def exact_attention(case: Attention, part: Inputs) -> dict[str, Tensor]:
    """out, or the gradients, of a few heads in fp64 by the reference, block by block of queries."""
    options = {"softcap": SOFTCAP if case.extra == "softcap" else 0.0, "window": case.span}
    leaves = {n: part[n].clone().requires_grad_() for n in ("k", "v", "sinks") if n in part}
    seqlen, backward = part["q"].shape[1], case.passes == "bwd"
    blocks: dict[str, list[Tensor]] = {"out": [], "dq": [], "dbias": []}
    for start in range(0, seqlen, QUERIES_AT_A_TIME):
        rows = slice(start, min(start + QUERIES_AT_A_TIME, seqlen))
        # Causal and windows are aligned with the last key: it must be the last query's own.
        seen = slice(0, rows.stop) if case.causal else slice(0, seqlen)
        q = part["q"][:, rows].clone().requires_grad_()
        more = {"q": q} | {n: part[n] for n in ("alibi_slopes",) if n in part}
        if "mask" in part:
            more["mask"] = part["mask"][:, :, rows, seen]
        if "bias" in part:
            more["bias"] = part["bias"][:, :, rows, seen].clone().requires_grad_()
        if "sinks" in part:
            more["sinks"] = leaves["sinks"]
        with torch.set_grad_enabled(backward):
            k, v = leaves["k"][:, seen], leaves["v"][:, seen]
            out = fastattn.attention(k=k, v=v, **more, **options, backend="reference")
        blocks["out"].append(out.detach())
        if backward:
            out.backward(part["dout"][:, rows])
            blocks["dq"].append(q.grad)
            if "bias" in more:
                blocks["dbias"].append(F.pad(more["bias"].grad, (0, seqlen - seen.stop)))
    if not backward:
        return {"out": torch.cat(blocks["out"], 1)}
    grads = {"dq": torch.cat(blocks["dq"], 1)} | {f"d{n}": x.grad for n, x in leaves.items()}
    return grads | ({"dbias": torch.cat(blocks["dbias"], 2)} if blocks["dbias"] else {})


# ---- peers -------------------------------------------------------------------------------------


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

    def before() -> None:
        graph[:] = [function(**leaves)]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(graph.pop(), tuple(leaves.values()), dout)

    def results(grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
        named = dict(zip((f"d{name}" for name in leaves), grads, strict=True))
        return {n: bshd(g) if n in ("dq", "dk", "dv") else g for n, g in named.items()}

    return Call(backward, results, before)


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


def our_peers(suites: frozenset[str], prepare: Callable, features: frozenset[str]) -> list[Peer]:
    """A peer a row of fastattn's table; its reference row is the eager path, everybody's peer."""
    return [
        Peer(
            name="eager" if row.name == "reference" else f"fastattn {row.name}",
            suites=suites,
            prepare=prepare(row.name),
            features=features,
            backend=row.name,
            unfit=lambda case, row=row: row.unusable(),
        )
        for row in backends.TABLE
    ]


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
    peers = [Peer(name="torch SDPA", suites=SUITES, prepare=sdpa(), features=most)]
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


PEERS = [*our_peers(SUITES, ours, ALL), *torch_peers()]
