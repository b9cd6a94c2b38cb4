"""csrc/cuda/ptx_sm90.cuh and panel_tile.cuh against what others emit for the same: the C++ wrappers
of PTX in CUDA's own headers, and Triton's compiler. No emulator of ours has a say here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "csrc" / "cuda"))
import nvcc  # noqa: E402
import wgmma  # noqa: E402

BARRIERS_AND_COPIES = """
#include <cuda/ptx>
#include "panel_tile.cuh"
using namespace fastattn::cuda;
namespace theirs = cuda::ptx;

#define ARGUMENTS const __grid_constant__ CUtensorMap map, int4 c, int count, int parity
__global__ void ours(ARGUMENTS) {
  FASTATTN_SHARED(shared);
  auto* barrier = reinterpret_cast<uint64_t*>(shared);
  ptx::mbarrier_init(barrier, count);
  ptx::fence_proxy_async();
  ptx::mbarrier_arrive(barrier);
  ptx::mbarrier_arrive_expect_tx(barrier, count);
  ptx::mbarrier_wait(barrier, parity);
  ptx::tma_load(shared + 1024, &map, barrier, c.x, c.y, c.z, c.w);
  ptx::tma_store(&map, shared + 1024, c.x, c.y, c.z, c.w);
  ptx::tma_reduce_add(&map, shared + 1024, c.x, c.y, c.z, c.w);
  ptx::bulk_commit();
  ptx::bulk_wait<1>();
  ptx::bulk_wait_read<1>();
}
__global__ void cccl(ARGUMENTS) {
  FASTATTN_SHARED(shared);
  auto* barrier = reinterpret_cast<uint64_t*>(shared);
  const int32_t at[4] = {c.x, c.y, c.z, c.w};
  const theirs::space_shared_t shared_space;
  theirs::mbarrier_init(barrier, count);
  theirs::fence_proxy_async(shared_space);
  theirs::mbarrier_arrive(theirs::sem_release, theirs::scope_cta, shared_space, barrier);
  theirs::mbarrier_arrive_expect_tx(theirs::sem_release, theirs::scope_cta, shared_space, barrier,
                                    count);
  while (!theirs::mbarrier_try_wait_parity(barrier, parity)) {}
  theirs::cp_async_bulk_tensor(theirs::space_cluster, theirs::space_global, shared + 1024, &map, at,
                               barrier);
  theirs::cp_async_bulk_tensor(theirs::space_global, shared_space, &map, at, shared + 1024);
  theirs::cp_reduce_async_bulk_tensor(theirs::space_global, shared_space, theirs::op_add, &map, at,
                                      shared + 1024);
  theirs::cp_async_bulk_commit_group();
  theirs::cp_async_bulk_wait_group(theirs::n32_t<1>{});
  theirs::cp_async_bulk_wait_group_read(theirs::n32_t<1>{});
}
"""

PRODUCTS = """
#include "panel_tile.cuh"
using namespace fastattn::cuda;
using ptx::Major;

template <Major kB>
__global__ void product(float* out) {
  FASTATTN_SHARED(shared);
  const PanelTile<64, 128> sA{shared};
  const PanelTile<128, 128> sB{shared + decltype(sA)::kBytes};
  float d[16][4] = {};
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const uint64_t b = kB == Major::kK ? sB.rows(0, k) : sB.columns(k);
    ptx::wgmma<Major::kK, kB>(d, sA.rows(0, k), b, k > 0, bf16{});
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < 64; i++) out[64 * threadIdx.x + i] = d[i / 4][i % 4];
}
template __global__ void product<Major::kK>(float*);
template __global__ void product<Major::kMN>(float*);
"""


def kernels_of(source: str, folder: Path) -> dict[str, str]:
    """The PTX of each kernel of a source, by name."""
    compiler = nvcc.find()
    if compiler is None:
        pytest.skip("there is no nvcc")
    file = folder / "source.cu"
    file.write_text(source)
    wgmma.write(folder / "wgmma.cuh", [128])
    command = [compiler, "-std=c++17", "-O3", "-ptx", "-gencode=arch=compute_90a,code=compute_90a"]
    command += [f"-I{folder}", f"-I{nvcc.HERE}", str(file), "-o", str(file.with_suffix(".ptx"))]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cuda/ptx" in done.stderr:
        pytest.skip("this CUDA toolkit has no <cuda/ptx>")
    assert done.returncode == 0, done.stderr
    _, *parts = re.split(r"\.entry (\w+)\(", file.with_suffix(".ptx").read_text())
    return dict(zip(parts[::2], parts[1::2], strict=True))


# --- barriers and copies --------------------------------------------------------------------------


def instructions(body: str) -> list[str]:
    """Those that only sm_90 has, with registers named by when they come."""
    found: list[str] = []
    names: dict[str, str] = {}
    for line in body.splitlines():
        line = " ".join(line.split("//")[0].split())
        if not re.match(r"mbarrier|fence|cp\.", line):
            continue
        opcode, _, operands = line.partition(" ")
        opcode = opcode.replace(".release.cta", "").replace(".shared.", ".shared::cta.")
        if opcode.startswith("mbarrier.arrive") or "try_wait" in opcode:
            operands = operands.partition(",")[2].strip()  # the state or predicate, unused or local
        operands = re.sub(r"%\w+", lambda m: names.setdefault(m[0], f"r{len(names)}"), operands)
        found.append(f"{opcode} {operands}")
    return found


def test_barriers_and_copies_are_those_of_cudas_headers(tmp_path: Path) -> None:
    kernels = {re.sub(r"^_Z\d(\w{4}).*", r"\1", name): instructions(body)
               for name, body in kernels_of(BARRIERS_AND_COPIES, tmp_path).items()}  # fmt: skip
    assert kernels["ours"] == kernels["cccl"] and len(kernels["ours"]) == 11


# --- products -------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A wgmma: its shape and types, descriptors without the tile's address, and flags."""

    opcode: str
    a: int
    b: int
    flags: str


def products(body: str) -> list[Product]:
    definitions: dict[str, tuple[str, str | None]] = {}
    found: list[Product] = []
    for line in body.splitlines():
        line = " ".join(line.split("//")[0].split())
        if match := re.match(r"(?:add|or|cvt|mov)\.[\w.]+ (%\w+), (%?\w+)(?:, (%?\w+))?;", line):
            definitions[match[1]] = match.group(2, 3)
        if match := re.match(r"(wgmma\.mma_async\S+) \{.*?\}, (%\w+), (%\w+), [%\w]+, (.*);", line):
            tiles = (constant_of(match[i], definitions) for i in (2, 3))
            found.append(Product(match[1], *tiles, match[4]))
    return found


def constant_of(operand: str | None, definitions: dict[str, tuple[str, str | None]]) -> int:
    """What is added to the start of a tile, which is known at run time only."""
    if operand is None or operand not in definitions:
        return int(operand, 0) if operand and operand.isdigit() else 0
    return sum(constant_of(part, definitions) for part in definitions[operand])


@pytest.mark.parametrize("major", ["k", "mn"])
def test_products_are_those_of_triton(major: str, tmp_path: Path) -> None:
    """Fields of descriptors, steps along k, flags: all that says how tiles lie."""
    pytest.importorskip("triton")
    kernels = kernels_of(PRODUCTS, tmp_path)
    (ours,) = (products(body) for name, body in kernels.items() if f"E{major == 'mn':d}E" in name)
    command = [sys.executable, str(HERE / "triton_products.py"), major]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = products(done.stdout)
    assert len(ours) == len(theirs) == 8
    assert ours == theirs
