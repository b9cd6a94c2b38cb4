"""Decoding: one query a sequence against a KV cache. Bound by reading the cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .attention_packages import HALVES
from .case import Call, Case, Inputs, Peer, Streaming, our_peers, randn

SUITE = frozenset({"decode"})


@dataclass(frozen=True, kw_only=True)
class Decode(Case):
    batch: int
    heads: int
    kv_heads: int
    keys: int
    head_dim: int
    page_size: int = 0  # 0 = a contiguous cache

    baseline = "torch SDPA"

    @property
    def name(self) -> str:
        pages = f" pages of {self.page_size}" if self.page_size else ""
        heads = f"H{self.heads}/{self.kv_heads}"
        return f"B{self.batch} {heads} keys {self.keys} D{self.head_dim}{pages}"

    @property
    def features(self) -> frozenset[str]:
        return frozenset({"pages"} if self.page_size else ())

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.heads * self.keys * self.head_dim

    @property
    def moved_bytes(self) -> float:
        cache = 2 * self.batch * self.keys * self.kv_heads
        return (cache + 2 * self.batch * self.heads) * self.head_dim * self.dtype.itemsize

    @property
    def streaming(self) -> Streaming:
        return "read"  # the output is next to nothing

    def inputs(self, device: torch.device) -> Inputs:
        g = self.generator(device)
        shape = (self.batch, self.keys, self.kv_heads, self.head_dim)
        q = randn(g, self.batch, 1, self.heads, self.head_dim, dtype=self.dtype)
        inputs = {"q": q} | {name: randn(g, *shape, dtype=self.dtype) for name in ("k", "v")}
        inputs["lengths"] = torch.full((self.batch,), self.keys, dtype=torch.int32, device=device)
        if self.page_size:  # pages in random order, as after many requests have come and gone
            pages = self.batch * self.keys // self.page_size
            table = torch.randperm(pages, generator=g, device=device)
            inputs["block_table"] = table.view(self.batch, -1).int()
            for name in ("k", "v"):
                pages = inputs[name].view(-1, self.page_size, *shape[2:])
                inputs[f"{name}_pages"] = torch.empty_like(pages)
                inputs[f"{name}_pages"][table] = pages
        return inputs

    def parts(self, name: str, result: Tensor) -> Tensor:
        return result[[0, -1]]

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        q, k, v = (inputs[name][[0, -1]].double() for name in ("q", "k", "v"))
        return {"out": fastattn.attention(q, k, v, backend="reference")}


def call(run: Callable[[], Tensor]) -> Call:
    """`run` gives (B, 1, H, D), or without the 1."""
    return Call(torch.no_grad()(run), lambda out: {"out": out if out.dim() == 4 else out[:, None]})


def cache(case: Decode, inputs: Inputs) -> tuple[Tensor, Tensor]:
    suffix = "_pages" if case.page_size else ""
    return inputs[f"k{suffix}"], inputs[f"v{suffix}"]


def ours(backend: str) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        assert isinstance(case, Decode)
        q, (k, v) = inputs["q"], cache(case, inputs)
        options = {"cache_seqlens": inputs["lengths"], "block_table": inputs.get("block_table")}
        return call(lambda: fastattn.attention_decode(q, k, v, backend=backend, **options))

    return prepare


def sdpa(folded: bool) -> Callable[[Case, Inputs], Call]:
    """`folded`: the query heads of a group as queries of their KV head, a user's own trick."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        assert isinstance(case, Decode)
        q, k, v = (inputs[name].transpose(1, 2).contiguous() for name in ("q", "k", "v"))
        gqa = case.heads != case.kv_heads and not folded
        if folded:
            q = q.view(case.batch, case.kv_heads, -1, case.head_dim)

        def run() -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
            return out.reshape(case.batch, 1, case.heads, case.head_dim)

        return call(run)

    return prepare


def flash_attn(module: str) -> Callable[[Case, Inputs], Call]:
    """flash_attn_with_kvcache, which splits the keys; 2 and 3 name the page table differently."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        assert isinstance(case, Decode)
        function: Any = importlib.import_module(module).flash_attn_with_kvcache
        q, (k, v) = inputs["q"], cache(case, inputs)
        options = {"cache_seqlens": inputs["lengths"]}
        if case.page_size:
            table = "page_table" if module == "flash_attn_interface" else "block_table"
            options[table] = inputs["block_table"]
        return call(lambda: function(q, k, v, **options))

    return prepare


def flashinfer(case: Case, inputs: Inputs) -> Call:
    """Its paged decoding, planned beforehand; a contiguous cache is pages in order."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    assert isinstance(case, Decode)
    device, page_size = inputs["q"].device, case.page_size or 16
    pages, shape = case.keys // page_size, (-1, page_size, case.kv_heads, case.head_dim)
    table = inputs.get("block_table", torch.arange(case.batch * pages, device=device)).flatten()
    ends = torch.arange(0, case.batch * pages + 1, pages, dtype=torch.int32, device=device)
    full = torch.full((case.batch,), page_size, dtype=torch.int32, device=device)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    sizes = (case.heads, case.kv_heads, case.head_dim, page_size)
    wrapper.plan(ends, table.int(), full, *sizes, q_data_type=case.dtype, kv_data_type=case.dtype)
    q, kv = inputs["q"][:, 0], tuple(x.view(shape) for x in cache(case, inputs))
    return call(lambda: wrapper.run(q, kv))


def odd_pages(case: Case) -> str | None:
    assert isinstance(case, Decode)
    return "pages are multiples of 256" if case.page_size % 256 else None


PAGES = frozenset({"pages"})
GPU_HALVES = {"suites": SUITE, "devices": ("cuda",), "dtypes": HALVES, "features": PAGES}
PEERS = [
    *our_peers(SUITE, ours, PAGES),
    Peer(name="torch SDPA", suites=SUITE, prepare=sdpa(folded=False)),
    Peer(name="torch SDPA, group folded", suites=SUITE, prepare=sdpa(folded=True)),
    Peer(
        name="flash-attn 2",
        module="flash_attn.flash_attn_interface",
        prepare=flash_attn("flash_attn.flash_attn_interface"),
        unfit=odd_pages,
        **GPU_HALVES,
    ),
    Peer(
        name="flash-attn 3",
        module="flash_attn_interface",
        prepare=flash_attn("flash_attn_interface"),
        **GPU_HALVES,
    ),
    Peer(name="FlashInfer", module="flashinfer", prepare=flashinfer, compiles=True, **GPU_HALVES),
]
