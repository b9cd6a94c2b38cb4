"""Attention, dense and packed: the cases, and what is right.

Time is of the forward pass (under no_grad), of the backward pass alone, or of both in one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.flops import attention_flops, visible_pairs

from .case import Case, Inputs, randn

QUERIES_AT_A_TIME = 2048  # of the exact result: fp64 scores are large
SOFTCAP = 20.0
DROPOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Attention(Case):
    """Self-attention. With `lengths`, sequences packed one after another (batch is 1 then)."""

    batch: int
    seqlen: int
    heads: int
    head_dim: int
    kv_heads: int = 0  # 0 = heads
    head_dim_v: int = 0  # 0 = head_dim
    passes: Literal["fwd", "bwd", "fwd+bwd"] = "fwd"
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
        found |= {"backward"} if self.passes != "fwd" else set()
        found |= {"window"} if self.window >= 0 else set()
        found |= {"grouped heads"} if self.group_size > 1 else set()
        found |= {"another D of v"} if self.head_dim_v else set()
        found |= {"packed sequences"} if self.lengths else set()
        return frozenset(found)

    @property
    def random(self) -> bool:
        return self.extra == "dropout"

    @property
    def span(self) -> tuple[int, int]:
        return (self.window, 0) if self.causal else (-1, -1)

    @property
    def flops(self) -> float:
        pairs = sum(visible_pairs(n, n, self.span) for n in self.lengths or (self.seqlen,))
        sizes = self.batch, self.heads, pairs, self.head_dim, self.head_dim_v or None
        return sum(attention_flops(*sizes, backward=x == "bwd") for x in self.passes.split("+"))

    @property
    def moved_bytes(self) -> float:
        """q and out, k and v; the backward pass reads them and dout, and writes dq, dk, dv."""
        dv = self.head_dim_v or self.head_dim
        kv_heads = self.heads // self.group_size
        passes = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[self.passes]
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
            side = math.ceil(S / 8)
            blocks = torch.rand(8, 8, generator=g, device=device) < 0.5
            mask = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)[:S, :S]
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
        if self.random:  # whose numbers belong to places: only the first head's are its own
            return [(0, slice(0, self.seqlen), 0)]
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
    options |= {"dropout_p": DROPOUT} if case.random else {}
    leaves = {n: part[n].clone().requires_grad_() for n in ("k", "v", "sinks") if n in part}
    seqlen, backward = part["q"].shape[1], case.passes != "fwd"
    at_a_time = seqlen if case.random else QUERIES_AT_A_TIME
    blocks: dict[str, list[Tensor]] = {"out": [], "dq": [], "dbias": []}
    for start in range(0, seqlen, at_a_time):
        rows = slice(start, min(start + at_a_time, seqlen))
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
