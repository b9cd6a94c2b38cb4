"""Which cases each suite has on a device, and who is asked to do them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastattn.gpt import GPTConfig

from . import attention_packages, attention_peers, decode, losses, package, train_step
from .attention import Attention
from .case import Case, Peer
from .decode import Decode
from .ladder import rungs
from .losses import CrossEntropy, LinearCrossEntropy
from .package import Package
from .train_step import TrainStep

SUITES = (
    "attention-fwd",
    "attention-bwd",
    "decode",
    "varlen",
    "cross-entropy",
    "linear-cross-entropy",
    "train-step",
    "features",
    "ladder",
    "import-and-build",
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def peers() -> list[Peer]:
    modules = (attention_peers, attention_packages, decode, losses, train_step, rungs, package)
    return [peer for module in modules for peer in module.PEERS]


def cases(device: str) -> list[Case]:
    found = list(cuda_cases() if device == "cuda" else cpu_cases())
    return sorted(found, key=lambda case: SUITES.index(case.suite))


# ---- CPU ---------------------------------------------------------------------------------------

# (B, H, S, D), rank with full attention, rank with causal, whether a quick run has the causal one
CPU_SHAPES = (
    ((8, 6, 256, 64), 2, 1, True),
    ((4, 12, 1024, 64), 0, 0, False),
    ((1, 12, 1024, 64), 3, 3, True),
    ((1, 16, 4096, 64), 1, 1, False),
    ((1, 8, 4096, 128), 1, 0, False),
)
# Of those, the ones of cpu_table.py, which has forward and backward pass in one.
TABLE_SHAPES = ((8, 6, 256, 64), (4, 12, 1024, 64), (1, 16, 4096, 64), (1, 8, 4096, 128))
EXTRAS = ("softcap", "mask", "bias", "alibi", "sinks", "dropout")


def cpu_cases() -> Iterator[Case]:
    for dtype in (FP32, BF16):
        for (B, H, S, D), full_rank, causal_rank, quick in CPU_SHAPES:
            shape = {"batch": B, "heads": H, "seqlen": S, "head_dim": D, "dtype": dtype}
            for passes in ("fwd", "bwd"):
                suite = {"suite": f"attention-{passes}", "passes": passes}
                yield Attention(**shape, **suite, rank=full_rank)
                yield Attention(**shape, **suite, rank=causal_rank, causal=True, quick=quick)
            for causal in (False, True) if (B, H, S, D) in TABLE_SHAPES else ():
                both = {"suite": "attention-bwd", "passes": "fwd+bwd", "causal": causal}
                yield Attention(**shape, **both, rank=3)
        for B, H_q, H_k, keys, rank in (
            (8, 32, 8, 4096, 0),
            (8, 8, 8, 4096, 1),
            (1, 32, 8, 32768, 1),
            (1, 32, 8, 4096, 2),
            (8, 32, 32, 4096, 3),
        ):
            sizes = {"batch": B, "heads": H_q, "kv_heads": H_k, "keys": keys, "head_dim": 128}
            yield Decode(suite="decode", dtype=dtype, **sizes, rank=rank, quick=rank == 2)
        for passes in ("fwd", "fwd+bwd", "fwd+bwd in place"):
            ce = {"suite": "cross-entropy", "dtype": dtype, "passes": passes}
            yield CrossEntropy(**ce, rows=2048, rank=1 if passes == "fwd" else 0)
            yield CrossEntropy(**ce, rows=256, rank=3, quick=True)
        linear = {"suite": "linear-cross-entropy", "dtype": dtype}
        yield LinearCrossEntropy(**linear, rows=2048, channels=768, rank=0)
        yield LinearCrossEntropy(**linear, rows=512, channels=256, vocab=8192, rank=3, quick=True)
        yield from varlen_cases(dtype, (700, 96, 512, 40, 333, 367), heads=12)
    for passes in ("fwd", "bwd"):
        (B, H, S, D), *_ = CPU_SHAPES[1]
        shape = {"batch": B, "heads": H, "seqlen": S, "head_dim": D, "dtype": FP16, "causal": True}
        yield Attention(suite=f"attention-{passes}", passes=passes, **shape, rank=2)
    yield from feature_cases(FP32, seqlen=1024, heads=12, passes=("fwd", "bwd"), rank=2)
    yield from feature_cases(FP32, seqlen=512, heads=6, passes=("fwd",), rank=3, quick=True)
    laptop = GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128)
    train = {"suite": "train-step", "dtype": FP32, "rank": 0}
    yield TrainStep(**train, label="nanoGPT's laptop", model=laptop, batch=12, quick=True)
    yield TrainStep(**train, label="GPT-2 124M", model=GPTConfig(), batch=1)
    yield Package(suite="import-and-build", what="import", rank=3, quick=True)
    yield Package(suite="import-and-build", what="install", rank=3)


def varlen_cases(dtype: torch.dtype, lengths: tuple[int, ...], heads: int) -> Iterator[Case]:
    shape = {"batch": 1, "heads": heads, "head_dim": 64, "causal": True, "dtype": dtype}
    packed = {"suite": "varlen", "lengths": lengths, "seqlen": sum(lengths)}
    yield Attention(**shape, **packed, passes="fwd", rank=2, quick=True)
    yield Attention(**shape, **packed, passes="bwd", rank=2)


def feature_cases(
    dtype: torch.dtype,
    *,
    seqlen: int,
    heads: int,
    passes: tuple[str, ...],
    rank: int,
    quick: bool = False,
) -> Iterator[Case]:
    """One shape with each feature, and without any, to see what it costs."""
    plain = {"suite": "features", "dtype": dtype, "batch": 1, "heads": heads, "seqlen": seqlen}
    plain |= {"head_dim": 64, "causal": True, "rank": rank, "quick": quick}
    for each in passes:
        yield Attention(**plain, passes=each)
        yield Attention(**plain, passes=each, window=seqlen // 8)
        yield Attention(**plain, passes=each, kv_heads=heads // 3 if heads % 3 == 0 else heads // 4)
        yield Attention(**plain, passes=each, head_dim_v=32)
        yield Attention(**plain | {"head_dim": 80}, passes=each)
        for extra in EXTRAS:
            causal = extra not in ("mask", "bias")  # torch takes a mask or causal, not both
            yield Attention(**plain | {"causal": causal}, passes=each, extra=extra)


# ---- CUDA --------------------------------------------------------------------------------------


def cuda_cases() -> Iterator[Case]:
    """16 k tokens and 2048 channels in all, as in the field's papers; then serving and features."""
    for dtype in (BF16, FP16, FP32):
        for D in (128, 64, 256):
            for S in (4096, 16384, 1024, 2048, 8192, 512):
                if dtype != BF16 and (S, D) not in ((4096, 128), (4096, 64)):
                    continue
                if dtype == FP32 and D == 256:
                    continue
                shape = {"batch": 16384 // S, "heads": 2048 // D, "seqlen": S, "head_dim": D}
                for causal in (True, False):
                    rank = cuda_rank(dtype, D, S, causal)
                    for passes in ("fwd", "bwd"):
                        yield Attention(
                            suite=f"attention-{passes}",
                            passes=passes,
                            dtype=dtype,
                            **shape,
                            causal=causal,
                            rank=rank,
                            quick=causal and S == 1024 and D == 64,
                        )
    for B, H_q, H_k, keys, page, rank in (
        (32, 32, 8, 4096, 0, 0),
        (1, 32, 8, 32768, 0, 1),
        (1, 32, 4, 1024, 0, 1),
        (32, 32, 32, 4096, 0, 2),
        (32, 32, 8, 4096, 16, 1),
        (32, 32, 8, 4096, 256, 2),
    ):
        sizes = {"batch": B, "heads": H_q, "kv_heads": H_k, "keys": keys, "head_dim": 128}
        yield Decode(
            suite="decode", dtype=BF16, **sizes, page_size=page, rank=rank, quick=keys == 1024
        )
    for vocab, rank in ((50304, 0), (128256, 1), (32000, 2)):
        for passes in ("fwd+bwd in place", "fwd", "fwd+bwd"):
            loss = {"suite": "cross-entropy", "vocab": vocab, "passes": passes, "rows": 8192}
            in_place = passes == "fwd+bwd in place"
            quick = vocab == 32000
            yield CrossEntropy(
                **loss, dtype=BF16, rank=rank if in_place else max(rank, 1), quick=quick
            )
    for rows, channels, vocab, rank in (
        (32768, 768, 50304, 0),
        (8192, 4096, 128256, 1),
        (4096, 4096, 128256, 2),
        (8192, 768, 50304, 3),
    ):
        yield LinearCrossEntropy(
            suite="linear-cross-entropy",
            dtype=BF16,
            rows=rows,
            channels=channels,
            vocab=vocab,
            rank=rank,
            quick=rank == 3,
        )
    gpt2 = GPTConfig(vocab_size=50304)  # padded to a multiple of 64, as trainers do
    train = {"suite": "train-step", "dtype": BF16, "label": "GPT-2 124M, V 50304"}
    yield TrainStep(**train, model=gpt2, batch=32, rank=0)
    yield TrainStep(**train, model=gpt2, batch=8, rank=3, quick=True)
    yield from varlen_cases(BF16, (4096, 512, 2048, 96, 1024, 333, 7000, 1275), heads=16)
    yield from feature_cases(BF16, seqlen=4096, heads=16, passes=("fwd", "bwd"), rank=2)
    yield from feature_cases(BF16, seqlen=1024, heads=16, passes=("fwd",), rank=4, quick=True)
    for dtype, batch in ((FP32, 1), (BF16, 4)):  # the naive rung takes a second for one batch entry
        for D in (128, 64):
            shape = {"batch": batch, "heads": 2048 // D, "seqlen": 4096, "head_dim": D}
            yield Attention(suite="ladder", dtype=dtype, **shape)
        quick = {"batch": 1, "heads": 4, "seqlen": 1024, "head_dim": 64}
        yield Attention(suite="ladder", dtype=dtype, **quick, rank=4, quick=True)
    yield Package(suite="import-and-build", what="import", rank=3, quick=True)


def cuda_rank(dtype: torch.dtype, D: int, S: int, causal: bool) -> int:
    if dtype != BF16:
        return 3
    if D in (64, 128) and S == 4096 and causal:
        return 0
    if D in (64, 128) and (S == 4096 or causal):
        return 1
    return 2
