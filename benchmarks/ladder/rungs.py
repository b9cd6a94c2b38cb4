"""The rungs: what each is, how it is compiled and called, on a GPU or in the emulator.

As peers of the suite `ladder` they are timed and checked as everybody else in the benchmarks.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import Attention
from ..case import Call, Case, Inputs, Peer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc" / "cuda"))
import nvcc
import wgmma

HERE, BUILD = Path(__file__).resolve().parent, nvcc.ROOT / "build" / "ladder"
HEAD_DIMS = (64, 128)
FP32, BF16 = torch.float32, torch.bfloat16


class Rung(NamedTuple):
    stem: str  # of its file
    adds: str
    dtype: torch.dtype
    oldest: int = 75  # the architecture it needs at least
    exactly: bool = False  # that one alone
    writes_scores: bool = False

    @property
    def source(self) -> Path:
        return HERE / f"{self.stem}.cu"

    @property
    def peer(self) -> str:
        """Its name in results files."""
        return f"ladder {self.stem}"

    def target(self, arch: int) -> str:
        return f"{arch}a" if self.exactly else str(arch)

    def refuses(self, arch: int) -> str | None:
        """None, or why a GPU can't run it."""
        if arch < self.oldest or (self.exactly and arch != self.oldest):
            return f"for sm_{self.target(self.oldest)}{'' if self.exactly else ' and later'}"
        return None


HOPPER = {"oldest": 90, "exactly": True}
RUNGS = (
    Rung("01_naive", "the formula, in three kernels", FP32, writes_scores=True),
    Rung("02_online", "online softmax: one kernel, no S × S", FP32),
    Rung("03_tiled", "tiles in shared memory and registers", FP32),
    Rung("04_tensor_cores", "mma.sync, P stays in registers", BF16, oldest=80),
    Rung("05_swizzled", "swizzle, ldmatrix, cp.async, ex2", BF16, oldest=80),
    Rung("06_wgmma_tma", "wgmma, TMA, mbarriers, a producer warp", BF16, **HOPPER),
    Rung("07_ping_pong", "two consumers in turns, setmaxnreg, persistent", BF16, **HOPPER),
)


# --- compiling and calling ------------------------------------------------------------------------


def compile_for_gpu(rung: Rung, arch: int, folder: Path = BUILD) -> Path:
    """The library; what ptxas said is beside it. Compiled where a source has changed."""
    compiler = nvcc.find()
    if compiler is None:
        raise RuntimeError("there is no nvcc in CUDA_HOME or on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    wgmma.write(folder / "wgmma.cuh")
    library = folder / f"{rung.stem}-sm_{arch}.so"
    sources = [*HERE.glob("*.h"), rung.source, *nvcc.HERE.glob("*")]
    made = library.stat().st_mtime if library.exists() else 0.0
    if any(source.stat().st_mtime > made for source in sources):
        target = rung.target(arch)
        command = [compiler, "-std=c++17", "-O3", "-Xptxas=-v", "-shared", "-cudart=static"]
        command += ["-Xcompiler=-fPIC", f"-gencode=arch=compute_{target},code=sm_{target}"]
        command += [f"-I{folder}", f"-I{nvcc.HERE}", "-o", str(library), str(rung.source)]
        done = subprocess.run(command, capture_output=True, text=True)
        library.with_suffix(".so.log").write_text(done.stderr)
        if done.returncode != 0:
            library.unlink(missing_ok=True)
            raise RuntimeError(f"nvcc can't compile {rung.stem}: {done.stderr[-2000:]}")
    return library


def load(library: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(library))
    found.ladder_forward.restype = ctypes.c_char_p
    return found


def arguments(q: Tensor, k: Tensor, v: Tensor, out: Tensor, workspace: Tensor | None) -> list:
    """ladder_forward's, of (heads, S, D) tensors, but for the device."""
    tensors = (q, k, v, out, workspace)
    return [*(t if t is None else ctypes.c_void_p(t.data_ptr()) for t in tensors), *q.shape]


def workspace_of(rung: Rung, q: Tensor) -> Tensor | None:
    heads, seqlen, _ = q.shape
    return q.new_empty(heads, seqlen, seqlen) if rung.writes_scores else None


# --- as peers of the benchmarks -------------------------------------------------------------------


def prepare(rung: Rung, case: Case, inputs: Inputs) -> Call:
    assert isinstance(case, Attention)
    device = torch.cuda.get_device_properties(inputs["q"].device)
    library = load(compile_for_gpu(rung, 10 * device.major + device.minor))
    q, k, v = (inputs[name].transpose(1, 2).flatten(0, 1).contiguous() for name in "qkv")
    out, workspace = torch.empty_like(q), workspace_of(rung, q)

    def run() -> Tensor:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        count = device.multi_processor_count
        problem = library.ladder_forward(*arguments(q, k, v, out, workspace), count, stream)
        if problem is not None:
            raise RuntimeError(problem.decode())
        return out

    def results(out: Tensor) -> dict[str, Tensor]:
        return {"out": out.unflatten(0, (case.batch, case.heads)).transpose(1, 2)}

    return Call(run, results)


def unfit(rung: Rung, case: Case) -> str | None:
    if isinstance(case, Attention) and case.head_dim not in HEAD_DIMS:
        return f"no D {case.head_dim}"
    major, minor = torch.cuda.get_device_capability()
    return rung.refuses(10 * major + minor)


PEERS = [
    Peer(
        name=rung.peer,
        suites=frozenset({"ladder"}),
        prepare=functools.partial(prepare, rung),
        devices=("cuda",),
        dtypes=(rung.dtype,),
        unfit=functools.partial(unfit, rung),
    )
    for rung in RUNGS
]
