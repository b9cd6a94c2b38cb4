"""The cases every backend is held to, and their inputs: attention and cross-entropy.

Small shapes, for each feature alone and for combinations that meet in one kernel; odd lengths, and
lengths around the sizes of tiles. Inputs are the same for a seed whatever the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .problem import AttentionProblem, CrossEntropyProblem, LinearCrossEntropyProblem

CAUSAL = (-1, 0)


@dataclass(frozen=True)
class Case:
    """One shape with one choice of features; `make_problem` fills it with numbers.

    Masks, biases and ALiBi slopes name the axes they have: "b11k" is (B, 1, 1, S_k).
    """

    name: str
    shape: tuple[int, int, int] = (2, 33, 33)  # B, S_q, S_k
    heads: tuple[int, int] = (2, 2)  # H_q, H_k
    head_dim: int = 16
    head_dim_v: int | None = None  # None = head_dim
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None  # None = head_dim ** -0.5
    softcap: float = 0.0
    mask: str = ""
    empty_rows: bool = False  # the mask hides every key from every third row
    bias: str = ""
    bias_fp32: bool = False  # else q's dtype
    alibi: str = ""  # "h" or "bh"
    sinks: bool = False
    dropout_p: float = 0.0
    strides: str = "contiguous"  # qkv, bhsd, padded, expanded: see _lay_out
    packed: tuple[tuple[int, int], ...] = ()  # (S_q, S_k) of each sequence, instead of `shape`

    def __str__(self) -> str:
        return self.name


EVERYTHING: dict[str, Any] = {
    "window": (50, 3),
    "softcap": 10.0,
    "mask": "b1qk",
    "bias": "1hqk",
    "alibi": "bh",
    "sinks": True,
    "dropout_p": 0.2,
}
RAGGED = ((33, 40), (2, 17), (18, 5))

CASES: tuple[Case, ...] = (
    # lengths: 1, 2, odd ones, and around the sizes of tiles
    Case("one", (1, 1, 1), (1, 1), 8),
    Case("lengths-1-5", (2, 1, 5), (4, 4), 16),
    Case("lengths-5-1", (2, 5, 1), (4, 4), 16),
    Case("lengths-2-3", (3, 2, 3), (3, 3), 16),
    Case("lengths-17-17", (2, 17, 17), (2, 2), 16),
    Case("lengths-63-65", (1, 63, 65), (2, 2), 32),
    Case("lengths-64-64", (1, 64, 64), (2, 2), 64),
    Case("lengths-100-257", (1, 100, 257), (2, 2), 32),
    Case("lengths-129-129", (1, 129, 129), (2, 2), 64),
    Case("decode-like", (2, 1, 257), (4, 2), 64, window=CAUSAL),
    # nothing to do
    Case("no-queries", (2, 0, 5), sinks=True),
    Case("no-keys", (2, 5, 0)),
    Case("no-keys-sinks", (2, 5, 0), sinks=True),
    Case("no-batch", (0, 5, 5), window=CAUSAL),
    # head dims: every D up to the next size built is filled with zeros
    Case("dim-1", head_dim=1),
    Case("dim-3", head_dim=3, window=CAUSAL),
    Case("dim-8", head_dim=8),
    Case("dim-33", head_dim=33, window=CAUSAL),
    Case("dim-40", head_dim=40),
    Case("dim-64", head_dim=64, window=CAUSAL),
    Case("dim-80", (1, 65, 65), head_dim=80),
    Case("dim-96", (1, 65, 65), head_dim=96, window=CAUSAL),
    Case("dim-128", (1, 65, 65), head_dim=128, window=CAUSAL),
    Case("dim-192", (1, 65, 65), head_dim=192),
    Case("dim-256", (1, 65, 65), head_dim=256, window=CAUSAL),
    Case("dims-64-32", head_dim=64, head_dim_v=32),
    Case("dims-16-72", head_dim=16, head_dim_v=72, window=CAUSAL),
    Case("dims-192-128", (1, 65, 65), head_dim=192, head_dim_v=128, window=CAUSAL),
    Case("dims-3-256", head_dim=3, head_dim_v=256),
    # query heads on fewer KV heads
    Case("gqa-2", (2, 33, 47), (4, 2), 32),
    Case("gqa-4-causal", (2, 65, 65), (4, 1), 32, window=CAUSAL),
    Case("gqa-8", (1, 17, 129), (8, 1), 64, window=CAUSAL),
    Case("gqa-3-dims", (1, 33, 33), (6, 2), 24, 40),
    # causal, bottom-right aligned, and windows
    Case("causal", (2, 65, 65), head_dim=32, window=CAUSAL),
    Case("causal-257", (1, 257, 257), head_dim=64, window=CAUSAL),
    Case("causal-more-keys", (1, 33, 100), window=CAUSAL),
    Case("causal-more-queries", (1, 100, 33), window=CAUSAL),
    Case("causal-one-key", (2, 5, 1), window=CAUSAL),
    Case("window-both", (1, 129, 129), window=(16, 16)),
    Case("window-causal", (1, 257, 257), head_dim=64, window=(63, 0)),
    Case("window-left", (1, 100, 129), window=(10, -1)),
    Case("window-right", (1, 100, 129), window=(-1, 20)),
    Case("window-diagonal", (1, 65, 65), window=(0, 0)),
    Case("window-more-queries", (1, 129, 65), window=(5, 3)),
    Case("window-wider-than-all", (1, 17, 17), window=(1000, 1000)),
    # what changes the scores
    Case("scale", scale=1.0),
    Case("scale-negative", scale=-0.5, window=CAUSAL),
    Case("scale-large", (1, 65, 65), scale=8.0),
    Case("softcap", (1, 65, 65), scale=1.0, softcap=2.0),
    Case("softcap-causal", (1, 65, 65), (4, 2), 64, softcap=15.0, window=CAUSAL),
    Case("alibi", (1, 33, 65), (4, 2), alibi="h"),
    Case("alibi-batch-causal", (2, 65, 65), (3, 3), alibi="bh", window=CAUSAL),
    Case("mask", (2, 33, 65), (4, 2), mask="bhqk"),
    Case("mask-padding", (2, 33, 65), mask="b11k"),
    Case("mask-shared", (2, 33, 65), mask="11qk"),
    Case("mask-heads", (2, 33, 65), mask="1h1k", window=CAUSAL),
    Case("mask-rows", (2, 65, 33), mask="b1q1"),
    Case("mask-empty-rows", (2, 33, 65), (4, 2), mask="bhqk", empty_rows=True),
    Case("mask-empty-rows-sinks", (2, 33, 33), mask="11qk", empty_rows=True, sinks=True),
    Case("bias", (2, 33, 65), (4, 2), bias="bhqk"),
    Case("bias-fp32", (2, 33, 65), bias="bhqk", bias_fp32=True),
    Case("bias-shared", (2, 33, 65), bias="11qk"),
    Case("bias-heads-causal", (2, 65, 65), bias="1hqk", window=CAUSAL),
    Case("bias-keys", (2, 33, 65), bias="b11k"),
    Case("bias-queries", (2, 33, 65), bias="1hq1", bias_fp32=True),
    Case("bias-per-head", (2, 17, 17), (4, 4), bias="1h11", bias_fp32=True),
    Case("sinks", (2, 33, 65), (4, 2), sinks=True),
    Case("sinks-window", (1, 129, 129), (4, 2), 64, sinks=True, window=(31, 0)),
    Case("dropout", (2, 33, 65), (4, 2), dropout_p=0.3),
    Case("dropout-causal-odd", (1, 65, 67), head_dim=64, dropout_p=0.1, window=CAUSAL),
    Case("dropout-sinks", (2, 17, 18), dropout_p=0.5, sinks=True),
    Case("everything", (2, 65, 67), (4, 2), 40, 24, empty_rows=True, **EVERYTHING),
    # memory layouts
    Case("strides-qkv", (2, 65, 65), (4, 2), 32, strides="qkv", window=CAUSAL),
    Case("strides-bhsd", (2, 65, 33), (4, 2), 40, strides="bhsd"),
    Case("strides-padded", (2, 33, 65), (4, 2), 33, 17, strides="padded", bias="bhqk", mask="b1qk"),
    Case("strides-expanded", (3, 33, 33), (4, 4), 32, strides="expanded", window=CAUSAL),
    # packed sequences
    Case("packed", heads=(4, 2), packed=((5, 5), (33, 33), (1, 1), (17, 17))),
    Case("packed-causal", head_dim=64, packed=((65, 65), (3, 129), (100, 17)), window=CAUSAL),
    Case("packed-empty", packed=((0, 7), (5, 0), (0, 0), (9, 4)), window=CAUSAL),
    Case("packed-qkv", heads=(4, 2), packed=((7, 7), (40, 40)), strides="qkv", window=(9, 0)),
    Case("packed-everything", (0, 0, 0), (4, 2), 24, 8, packed=RAGGED, **EVERYTHING),
)


def make_problem(
    case: Case, dtype: torch.dtype, seed: int = 0, device: torch.device | str | None = None
) -> AttentionProblem:
    """The case with standard normal inputs, on torch's default device if none is named."""
    rng = Normal(seed, device)
    heads_q, heads_k = case.heads
    batch, seqlen_q, seqlen_k = case.shape
    tokens_q: tuple[int, ...] = (batch, seqlen_q)
    tokens_k: tuple[int, ...] = (batch, seqlen_k)
    if case.packed:
        lengths_q, lengths_k = zip(*case.packed, strict=True)
        batch, seqlen_q, seqlen_k = len(case.packed), max(lengths_q), max(lengths_k)
        tokens_q, tokens_k = (sum(lengths_q),), (sum(lengths_k),)
    shapes = (
        (*tokens_q, heads_q, case.head_dim),
        (*tokens_k, heads_k, case.head_dim),
        (*tokens_k, heads_k, case.head_dim if case.head_dim_v is None else case.head_dim_v),
    )
    q, k, v = _lay_out(case.strides, shapes, dtype, rng)
    sizes = {"b": batch, "h": heads_q, "q": seqlen_q, "k": seqlen_k, "1": 1}

    def shape_of(pattern: str) -> list[int]:
        return [sizes[axis] for axis in pattern]

    mask = bias = alibi_slopes = sinks = philox_seed = None
    if case.mask:
        mask = rng(shape_of(case.mask)) > -0.5  # about 7 of 10 attend
        if case.empty_rows:
            mask[:, :, ::3] = False
    if case.bias:
        bias = rng(shape_of(case.bias), torch.float32 if case.bias_fp32 else dtype)
    if case.alibi:
        alibi_slopes = rng(shape_of(case.alibi)).abs() / 4
    if case.sinks:
        sinks = rng([heads_q])
    if case.dropout_p > 0:
        philox_seed = torch.tensor((seed << 32) + 0x5EED_1234, device=rng.device)
    problem = AttentionProblem(
        q,
        k,
        v,
        mask,
        bias,
        alibi_slopes,
        sinks,
        philox_seed,
        window_left=case.window[0],
        window_right=case.window[1],
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
        softcap=case.softcap,
        dropout_p=case.dropout_p,
    )
    if not case.packed:
        return problem
    return problem._replace(
        cu_seqlens_q=_offsets(lengths_q, rng.device),
        cu_seqlens_k=_offsets(lengths_k, rng.device),
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
    )


class Normal:
    """Standard normal tensors from one generator on the CPU, brought to a device."""

    def __init__(self, seed: int, device: torch.device | str | None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.get_default_device() if device is None else torch.device(device)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device="cpu")
        return x.to(self.device, dtype)


def _lay_out(
    strides: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, rng: Normal
) -> list[Tensor]:
    """q, k, v of the shapes given: (B, S, H, D) or (T, H, D).

    qkv: slices of one (…, H_q + 2 H_k, D) projection. bhsd: heads lie before tokens in memory.
    padded: rows longer than D that start one element late, so nothing is aligned.
    expanded: all queries alike, and K, V alike for all heads and batch entries, by stride 0.
    """
    if strides == "qkv":
        heads = [shape[-2] for shape in shapes]
        projection = rng((*shapes[0][:-2], sum(heads), shapes[0][-1]), dtype)
        return list(projection.split(heads, dim=-2))
    if strides == "bhsd":
        return [rng((*s[:-3], s[-2], s[-3], s[-1]), dtype).transpose(-2, -3) for s in shapes]
    if strides == "padded":
        return [rng((*s[:-1], s[-1] + 3), dtype)[..., 1:-2] for s in shapes]
    if strides == "expanded":
        q, k, v = shapes
        alike = [(q[0], 1, *q[2:]), (1, k[1], 1, k[3]), (1, v[1], 1, v[3])]
        return [rng(a, dtype).expand(s) for a, s in zip(alike, shapes, strict=True)]
    return [rng(s, dtype) for s in shapes]


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


# --- cross-entropy --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossEntropyCase:
    """Logits (rows, vocab) and the options of a loss over them."""

    name: str
    rows: int = 17
    vocab: int = 33
    ignored: float = 0.2  # share of rows
    ignore_index: int = -100
    label_smoothing: float = 0.0
    weight: bool = False
    z_loss: float = 0.0
    softcap: float = 0.0
    spread: float = 2.0  # standard deviation of the logits
    offset: float = 0.0  # added to all of them, a different share in each row
    confidence: float = 0.0  # added to the target's
    padding: int = 0  # logits are a slice of rows this much longer

    def __str__(self) -> str:
        return self.name


CE_CASES: tuple[CrossEntropyCase, ...] = (
    CrossEntropyCase("plain"),
    CrossEntropyCase("vocab-1", vocab=1, z_loss=0.1),
    CrossEntropyCase("vocab-2", vocab=2),
    CrossEntropyCase("vocab-7", rows=129, vocab=7),
    CrossEntropyCase("vocab-65", rows=100, vocab=65, label_smoothing=0.1),
    CrossEntropyCase("vocab-1000", vocab=1000),
    CrossEntropyCase("vocab-50257", rows=9, vocab=50257, label_smoothing=0.1, weight=True),
    CrossEntropyCase("one-row", rows=1, ignored=0.0),
    CrossEntropyCase("no-rows", rows=0),
    CrossEntropyCase("all-ignored", ignored=1.0, label_smoothing=0.1, z_loss=1e-3),
    CrossEntropyCase("ignore-index-in-vocab", rows=100, vocab=7, ignored=0.0, ignore_index=3),
    CrossEntropyCase("smoothing", label_smoothing=0.1),
    CrossEntropyCase("smoothing-1", label_smoothing=1.0),
    CrossEntropyCase("weight", weight=True),
    CrossEntropyCase("weight-smoothing", vocab=1000, weight=True, label_smoothing=0.3),
    CrossEntropyCase("z-loss", z_loss=1e-2),
    CrossEntropyCase("softcap", softcap=3.0),
    CrossEntropyCase("softcap-30", vocab=1000, softcap=30.0, spread=20.0, z_loss=1e-4),
    CrossEntropyCase("everything", 33, 129, 0.3, 5, 0.2, True, 1e-2, 10.0, 5.0),
    CrossEntropyCase("offset", offset=2.0**24, spread=8.0),
    CrossEntropyCase("offset-negative", vocab=1000, offset=-(2.0**24), spread=8.0),
    CrossEntropyCase("confident", rows=129, vocab=1000, confidence=30.0),
    CrossEntropyCase("wide", vocab=1000, spread=100.0),
    CrossEntropyCase("equal-logits", spread=0.0),
    CrossEntropyCase("padded", vocab=65, padding=3, weight=True, label_smoothing=0.1),
)


def make_cross_entropy_problem(
    case: CrossEntropyCase,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> CrossEntropyProblem:
    """The case with normal logits and uniform targets; every fifth class has weight 0."""
    rng = Normal(seed, device)
    rows, vocab, device = case.rows, case.vocab, rng.device
    target = torch.randint(vocab, (rows,), generator=rng.generator, device="cpu").to(device)
    logits = case.spread * rng((rows, vocab + case.padding))
    logits[torch.arange(rows, device=device), target] += case.confidence
    offset = max(min(case.offset, 2.0**14), -(2.0**14)) if dtype == torch.float16 else case.offset
    logits += offset * torch.linspace(0.5, 1.0, rows, device=device)[:, None]
    hidden = torch.arange(rows, device=device) < round(case.ignored * rows)
    target = torch.where(hidden, case.ignore_index, target)
    weight = None
    if case.weight:
        weight = rng([vocab]).abs() + 0.1
        weight[4::5] = 0.0
    return CrossEntropyProblem(
        logits.to(dtype)[:, :vocab],
        target,
        weight,
        case.ignore_index,
        case.label_smoothing,
        case.z_loss,
        case.softcap,
    )


LINEAR_CE_CASES = tuple(
    case for case in CE_CASES if case.vocab <= 1000 and not (case.padding or case.offset)
)


def make_linear_cross_entropy_problem(
    case: CrossEntropyCase,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str | None = None,
    channels: int = 70,  # more than one step of a kernel, the last of them not whole
    bias: bool = True,
) -> LinearCrossEntropyProblem:
    """The case's targets and options over a last layer whose logits have about its spread."""
    targets_and_options = make_cross_entropy_problem(case, torch.float32, seed, device)[1:]
    rng = Normal(seed + 1, device)
    return LinearCrossEntropyProblem(
        (case.spread * rng((case.rows, channels))).to(dtype),
        (channels**-0.5 * rng((case.vocab, channels))).to(dtype),
        rng((case.vocab,), dtype) if bias else None,
        *targets_and_options,
    )
