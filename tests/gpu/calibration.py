"""Whether a GPU and the emulator mean the same by every function of csrc/cuda/ptx.cuh and
ptx_sm90.cuh.

calibration*.cu have a probe for each. They are compiled twice, by nvcc for the GPU and by g++ for
the emulator, and both get the same words: random bits, and those at the edges of formats. What
moves or rounds bits must give the same bits. Approximations may differ by what the PTX ISA allows,
and a product's fp32 sum by the order in which tensor cores add and how they round: there the
largest difference is reported beside what is allowed, and inputs whose sums are exact must give the
same bits.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from emulator import build as emulator
from torch import Tensor

from gpu import calibration_products as products
from gpu.calibration_products import FORMATS

sys.path.insert(0, str(emulator.ROOT / "csrc" / "cuda"))
import wgmma

HERE = Path(__file__).parent
# By the first architecture that has the functions. What sm_90a has is nowhere else.
PROBES = {
    75: (
        "ldmatrix_x4", "ldmatrix_x4_trans", "mma_m16n8k8_fp16", "named_barriers", "ex2", "lg2",
        "rcp", "pack_bf16", "pack_fp16", "to_float_fp16", "anew",
    ),
    80: ("mma_m16n8k16_bf16", "mma_m16n8k16_fp16", "cp_async_16", "cp_async_groups"),
    90: (
        "mbarriers", "run_time_barriers", "set_max_registers", "tma_load_fp32", "tma_load_bf16",
        "tma_load_fp16", "tma_store", "tma_reduce_add", *products.WGMMA_PROBES,
    ),
}  # fmt: skip
SOURCES = {75: "calibration.cu", 80: "calibration_sm80.cu", 90: "calibration_sm90.cu"}


def found_on(arch: int) -> list[int]:
    """The architectures of PROBES whose functions this one has."""
    return [first for first in PROBES if first <= min(arch, 89) or first == arch == 90]


def probes(arch: int) -> list[str]:
    return [name for first in found_on(arch) for name in PROBES[first]]


def sources(arch: int) -> list[Path]:
    return [HERE / "calibration_run.cu", *(HERE / SOURCES[first] for first in found_on(arch))]


def compile_for_emulator() -> Path:
    return emulator.build("calibration", sources(90), ["-Wno-psabi"])


def compile_for_gpu(compiler: str, arch: int, library: Path) -> Path:
    library.parent.mkdir(parents=True, exist_ok=True)
    wgmma.write(library.parent / "wgmma.cuh")
    target = "90a" if arch == 90 else str(arch)
    command = [compiler, "-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static"]
    command += [f"-gencode=arch=compute_{target},code=sm_{target}", "--threads=4"]
    command += [f"-I{library.parent}", f"-I{emulator.ROOT}/csrc/cuda"]
    subprocess.run([*command, "-o", str(library), *map(str, sources(arch))], check=True)
    return library


class Library:
    """One of the two."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name in ("calibration_names", "calibration_run"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def names(self) -> list[str]:
        return self._library.calibration_names().decode().split()

    def shape(self, name: str) -> tuple[int, int, int]:
        """Threads of a block, words in and words out of a thread."""
        shape = (ctypes.c_int * 3)()
        self._library.calibration_shape(name.encode(), shape)
        return shape[0], shape[1], shape[2]

    def run(self, name: str, words: Tensor) -> Tensor:
        """int32 (blocks, threads, words in) to int32 (blocks, threads, words out)."""
        threads, words_in, words_out = self.shape(name)
        assert words.shape[1:] == (threads, words_in) and words.dtype == torch.int32
        words, out = words.contiguous(), torch.empty(*words.shape[:2], words_out, dtype=torch.int32)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (words, out))
        problem = self._library.calibration_run(name.encode(), *pointers, len(words))
        if problem is not None:
            raise RuntimeError(problem.decode())
        return out


class Difference(NamedTuple):
    """Between a probe's two results on one kind of input."""

    probe: str
    inputs: str
    values: int
    largest: float  # in the unit of `allowed`
    allowed: float
    unit: str
    worst: str  # where they differ most, if by more than is allowed

    @property
    def passed(self) -> bool:
        return self.largest <= self.allowed

    def __str__(self) -> str:
        text = f"{self.probe}, {self.inputs}: {self.largest:.3g} {self.unit}"
        return text + (f" of {self.allowed:.3g}" if self.passed else f", {self.worst}")


Compare = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, float, str]]


def compare(name: str, gpu: Library, ours: Library, blocks: int = 64) -> list[Difference]:
    """A probe's differences, one for each kind of input."""
    threads, words_in, _ = gpu.shape(name)
    differences = []
    for kind, words in inputs_of(name, blocks, threads, words_in):
        theirs, expected = gpu.run(name, words), ours.run(name, words)
        excess, allowed, unit = comparison_of(name, kind)(theirs, expected, words)
        at = int(excess.flatten().argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), excess.shape))
        worst = (
            f"the GPU has {_hex(theirs[where])}, the emulator {_hex(expected[where])}"
            f" of block {where[0]}, thread {where[1]}, word {where[2]} from"
            f" {' '.join(_hex(w) for w in words[where[:2]])}"
        )
        largest = float(excess.max())
        differences.append(Difference(name, kind, theirs.numel(), largest, allowed, unit, worst))
    return differences


def _hex(word: Tensor) -> str:
    return f"{int(word) & 0xFFFFFFFF:08x}"


# --- inputs ---------------------------------------------------------------------------------------

# zeros, smallest and largest denormals and normals, one and its neighbours, infinities, NaNs
EDGES = (
    0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x00800001, 0x3F7FFFFF, 0x3F800000, 0x3F800001,
    0x3F000000, 0x40000000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x42FE0000,
    0x42FF0000, 0x43150000, 0x43160000, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001,
    0x387FC000, 0x387FFFFF, 0x38800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7F8000,
)  # fmt: skip


def inputs_of(name: str, blocks: int, threads: int, words: int) -> list[tuple[str, Tensor]]:
    shape = (blocks, threads, words)
    if products.is_product(name):
        return products.inputs(name, shape)
    if name == "tma_reduce_add":  # sums of two
        return [("numbers", torch.randn(shape).view(torch.int32))]
    bits = [("random bits", products.random_bits(shape))]
    if name in ("ex2", "lg2", "rcp", "pack_bf16", "pack_fp16"):
        bits.append(("edges", edges(shape)))
        near = torch.randn(shape) * torch.exp2(torch.randint(-30, 7, shape).float())
        bits.append(("numbers", near.view(torch.int32)))
    if name == "to_float_fp16":  # all there are
        every = torch.arange(1 << 16, dtype=torch.int32)
        bits = [("every fp16", every.view(-1, threads, 1))]
    return bits


def edges(shape: tuple[int, int, int]) -> Tensor:
    """Every edge beside every other, with both signs."""
    values = torch.tensor(EDGES)
    values = torch.cat((values, values + 2**31))
    pairs = torch.cartesian_prod(values, values)[:, : shape[2]].reshape(-1)
    count = math.prod(shape)
    return pairs.repeat(-(-count // len(pairs)))[:count].view(shape).to(torch.int32)


# --- comparisons ----------------------------------------------------------------------------------


def comparison_of(name: str, inputs: str) -> Compare:
    if name == "lg2":
        return logarithms
    if name in ULPS:
        return floats_within(ULPS[name])
    if products.is_product(name):
        if inputs in ("integers", "single products"):
            return floats_within(0)
        return sums_within(name)
    if name in ("pack_bf16", "pack_fp16"):
        return halves_equal(FORMATS[name.removeprefix("pack_")])
    return floats_within(0) if name in ("to_float_fp16", "tma_reduce_add") else bits_equal


ULPS = {"ex2": 3, "rcp": 2}  # what the PTX ISA allows and libm's error together


def bits_equal(gpu: Tensor, ours: Tensor, words: Tensor) -> tuple[Tensor, float, str]:
    return (gpu != ours).double(), 0.0, "words of other bits"


def halves_equal(dtype: torch.dtype) -> Compare:
    """Two 16-bit floats a word; one NaN is like another."""

    def compare(gpu: Tensor, ours: Tensor, words: Tensor) -> tuple[Tensor, float, str]:
        pairs = [t.view(dtype).view(*t.shape, 2) for t in (gpu, ours)]
        same_bits = gpu.view(torch.int16) == ours.view(torch.int16)
        nan = pairs[0].isnan() & pairs[1].isnan()
        wrong = ~(same_bits.view(nan.shape) | nan)
        return wrong.any(-1).double(), 0.0, "words of other bits"

    return compare


def floats_within(ulps: int) -> Compare:
    """Steps between neighbouring floats; one NaN is like another."""

    def compare(gpu: Tensor, ours: Tensor, words: Tensor) -> tuple[Tensor, float, str]:
        nan = gpu.view(torch.float32).isnan() & ours.view(torch.float32).isnan()
        steps = (_ordered(gpu) - _ordered(ours)).abs().double()
        return steps.where(~nan, 0.0), float(ulps), "ulp"

    return compare


def logarithms(gpu: Tensor, ours: Tensor, words: Tensor) -> tuple[Tensor, float, str]:
    """As floats_within; of numbers from 1/2 to 2, absolute errors in steps of 2^-22."""
    steps, allowed, unit = floats_within(3)(gpu, ours, words)
    x, y = gpu.view(torch.float32).double(), ours.view(torch.float32).double()
    number = words.view(torch.float32)
    near_one = (number >= 0.5) & (number <= 2.0)
    return torch.where(near_one, (x - y).abs() * 2**22, steps), allowed, unit


def _ordered(bits: Tensor) -> Tensor:
    """Floats' bits as integers in the floats' order, −0 just before 0."""
    bits = bits.long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


def sums_within(name: str) -> Compare:
    """Differences of sums of products as a share of Σ|a·b| + |d|, in steps of fp32 (2^-23).

    Each of the k additions may round, or cut off, one step of the largest term. Where infinities or
    NaN meet, both must have the same."""

    def compare(gpu: Tensor, ours: Tensor, words: Tensor) -> tuple[Tensor, float, str]:
        x, y = gpu.view(torch.float32).double(), ours.view(torch.float32).double()
        a, b, d = products.operands(name, words)
        size = products.fragments(name, a.abs() @ b.abs() + d.abs())
        share = (x - y).abs() / size * 2**23
        share = share.where(x != y, 0.0).where(~(x.isnan() & y.isnan()), 0.0)
        # too large for fp32 on the way, in one order or the other
        overflow = ~(size < torch.finfo(torch.float32).max) & ~(x.isfinite() & y.isfinite())
        tiny = size < 2.0**-100  # products below the least normal float, kept or flushed
        share = share.where(~overflow & ~tiny, 0.0)
        return share.nan_to_num(math.inf, math.inf), float(a.shape[-1]), "steps of the sum's size"

    return compare
