"""The cases of decoding that every backend is held to, and their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import CAUSAL, Normal
from .problem import DecodeProblem


@dataclass(frozen=True)
class DecodeCase:
    """A cache of sequences already `lengths` long, and what one decoding step asks of it."""

    name: str
    lengths: tuple[int, ...] = (5, 33, 0)  # keys in the cache of each sequence, before the append
    seqlen_q: int = 1
    seqlen_new: int = 0  # keys appended
    capacity: int = 48  # positions a sequence has room for
    heads: tuple[int, int] = (4, 2)  # H_q, H_k
    head_dim: int = 32
    head_dim_v: int | None = None
    page_size: int = 0  # 0 = not paged
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    rotary_fp32: bool = False  # the tables, else q's dtype
    leftpad: tuple[int, ...] = ()
    batch_idx: tuple[int, ...] = ()  # rows of a cache that has two rows to spare
    alibi: str = ""
    sinks: bool = False
    num_splits: int = 0

    def __str__(self) -> str:
        return self.name


DECODE_CASES: tuple[DecodeCase, ...] = (
    DecodeCase("plain"),
    DecodeCase("one-sequence-long", (600,), capacity=640, heads=(8, 2), head_dim=64),
    DecodeCase("splits-1", (300, 7), capacity=300, num_splits=1),
    DecodeCase("splits-5", (300, 7), capacity=300, num_splits=5),
    DecodeCase("splits-more-than-keys", (3, 300), capacity=300, num_splits=64, sinks=True),
    DecodeCase("mha", heads=(3, 3), head_dim=40),
    DecodeCase("mqa", heads=(8, 1), head_dim=128),
    DecodeCase("dims", head_dim=24, head_dim_v=72),
    DecodeCase("dim-256", head_dim=256),
    DecodeCase("dim-3", head_dim=3, head_dim_v=1),
    DecodeCase("empty-cache", (0, 0)),
    DecodeCase("empty-cache-sinks", (0, 4), sinks=True),
    DecodeCase("queries-4", seqlen_q=4),
    DecodeCase("queries-4-causal", seqlen_q=4, window=CAUSAL),
    DecodeCase("append-1", seqlen_new=1, window=CAUSAL),
    DecodeCase("append-5-causal", seqlen_q=5, seqlen_new=5, window=CAUSAL),
    DecodeCase("append-fewer", seqlen_q=5, seqlen_new=2, window=CAUSAL),
    DecodeCase("window", (100, 41), 3, 3, capacity=110, window=(16, 0)),
    DecodeCase("window-both", (100, 41), 3, capacity=110, window=(16, 1)),
    DecodeCase("softcap", softcap=2.0),
    DecodeCase("alibi", seqlen_q=3, window=CAUSAL, alibi="h"),
    DecodeCase("alibi-batch", seqlen_q=3, alibi="bh"),
    DecodeCase("sinks", seqlen_q=2, sinks=True, window=CAUSAL),
    DecodeCase("leftpad", seqlen_q=2, leftpad=(4, 7, 0), alibi="h", window=CAUSAL),
    DecodeCase("leftpad-append", (5, 33, 3), 2, 2, leftpad=(5, 7, 0), window=(6, 0), rotary_dim=16),
    DecodeCase("batch-idx", batch_idx=(4, 0, 2), seqlen_new=1),
    DecodeCase("rotary", seqlen_new=1, rotary_dim=32),
    DecodeCase("rotary-interleaved", seqlen_new=1, rotary_dim=32, rotary_interleaved=True),
    DecodeCase("rotary-partial", seqlen_q=3, seqlen_new=3, rotary_dim=16, window=CAUSAL),
    DecodeCase("rotary-partial-interleaved", seqlen_new=1, rotary_dim=6, rotary_interleaved=True),
    DecodeCase("rotary-not-windowed", seqlen_q=4, seqlen_new=4, rotary_dim=32, rotary_fp32=True),
    DecodeCase("rotary-no-append", seqlen_q=2, rotary_dim=32, window=CAUSAL, rotary_fp32=True),
    DecodeCase("paged", page_size=16),
    DecodeCase("paged-1", page_size=1, seqlen_new=1),
    DecodeCase("paged-7-append", page_size=7, seqlen_q=9, seqlen_new=9, window=CAUSAL),
    DecodeCase(
        "paged-everything",
        (100, 31, 0),
        seqlen_q=3,
        seqlen_new=3,
        capacity=112,
        page_size=16,
        head_dim=40,
        head_dim_v=24,
        window=(60, 0),
        softcap=10.0,
        rotary_dim=24,
        rotary_interleaved=True,
        leftpad=(9, 0, 0),
        alibi="bh",
        sinks=True,
    ),
)


def make_decode_problem(
    case: DecodeCase, dtype: torch.dtype, seed: int = 0, device: torch.device | str | None = None
) -> DecodeProblem:
    """The case with standard normal inputs; NaN wherever the cache holds no key to attend to."""
    rng = Normal(seed, device)
    device = rng.device
    heads_q, heads_k = case.heads
    batch = len(case.lengths)
    head_dim_v = case.head_dim if case.head_dim_v is None else case.head_dim_v
    starts = case.leftpad or (0,) * batch

    pages = -(-case.capacity // case.page_size) if case.page_size else 1  # of each sequence
    page_size = case.page_size or case.capacity
    rows = batch * pages + 2  # two that nobody uses
    order = torch.randperm(rows, generator=rng.generator, device="cpu")
    order = order[: batch * pages].view(batch, pages)
    if not case.page_size:
        order = torch.tensor(case.batch_idx or range(batch), device="cpu").view(batch, 1)
        rows = rows if case.batch_idx else batch
    k_cache, v_cache = (
        torch.full((rows, page_size, heads_k, dim), torch.nan, dtype=dtype, device=device)
        for dim in (case.head_dim, head_dim_v)
    )
    for b, (start, length) in enumerate(zip(starts, case.lengths, strict=True)):
        for position in range(start, length):
            place = order[b, position // page_size], position % page_size
            k_cache[place] = rng((heads_k, case.head_dim), dtype)
            v_cache[place] = rng((heads_k, head_dim_v), dtype)

    def int32(values: Sequence[int]) -> Tensor | None:
        return torch.tensor(values, dtype=torch.int32, device=device) if values else None

    block_table = None
    if case.page_size:
        block_table = order.to(device, torch.int32)
        for b, length in enumerate(case.lengths):  # −1 where no page is needed
            block_table[b, -(-(length + case.seqlen_new) // page_size) :] = -1
    k = v = cos = sin = None
    if case.seqlen_new:
        k = rng((batch, case.seqlen_new, heads_k, case.head_dim), dtype)
        v = rng((batch, case.seqlen_new, heads_k, head_dim_v), dtype)
    if case.rotary_dim:
        positions = torch.arange(case.capacity + case.seqlen_q, device=device)
        even = torch.arange(0, case.rotary_dim, 2, device=device)
        angles = positions[:, None] * 10000.0 ** -(even / case.rotary_dim)
        table_dtype = torch.float32 if case.rotary_fp32 else dtype
        cos, sin = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
    alibi_shape = [{"b": batch, "h": heads_q}[axis] for axis in case.alibi]
    return DecodeProblem(
        rng((batch, case.seqlen_q, heads_q, case.head_dim), dtype),
        k_cache,
        v_cache,
        torch.tensor(case.lengths, dtype=torch.int32, device=device),
        k,
        v,
        cos,
        sin,
        block_table,
        cache_batch_idx=int32(case.batch_idx),
        cache_leftpad=int32(case.leftpad),
        alibi_slopes=rng(alibi_shape).abs() / 4 if case.alibi else None,
        sinks=rng([heads_q]) if case.sinks else None,
        rotary_interleaved=case.rotary_interleaved,
        window_left=case.window[0],
        window_right=case.window[1],
        scale=case.head_dim**-0.5,
        softcap=case.softcap,
        num_splits=case.num_splits,
    )
