"""What a device can do at best, and the floor under a case."""

import pytest
import torch

from benchmarks import ceilings
from benchmarks.ceilings import Ceilings
from benchmarks.device import Cpu
from benchmarks.losses import CrossEntropy

BF16 = torch.bfloat16


@pytest.fixture
def made_up():
    c = Ceilings(Cpu())
    c.gemm, c.fma, c.memory = {"float32": 100.0, "bfloat16": 300.0}, 200.0, 10.0
    return c


def test_a_floor_is_the_larger_of_compute_and_memory(made_up):
    both = {"flops": 2000, "moved_bytes": 110, "dtype": "float32"}
    assert made_up.floor(both) == (11.0, "memory")
    assert made_up.floor(both | {"flops": 3000}) == (15.0, "compute")
    assert made_up.floor(both | {"flops": 3000, "dtype": "bfloat16"}) == (11.0, "memory")
    assert made_up.floor(both | {"flops": 0}) == (11.0, "memory")
    assert made_up.floor(both | {"flops": 0, "moved_bytes": 0}) is None
    assert Ceilings(Cpu()).floor(both) is None
    assert made_up.floor(both | {"streaming_seconds": 12.0}) == (12.0, "memory")
    assert made_up.floor(both | {"streaming_seconds": 9.0}) == (10.0, "compute")


def test_fp32_registers_are_a_ceiling_for_all_dtypes(made_up):
    assert made_up.flops("float32") == 200 and made_up.flops("bfloat16") == 300
    made_up.fma = 1000.0
    assert made_up.flops("bfloat16") == 1000


@pytest.mark.parametrize("passes", ["fwd", "fwd+bwd", "fwd+bwd in place"])
def test_as_many_bytes_are_streamed_as_the_case_moves(passes, monkeypatch):
    case = CrossEntropy(suite="", dtype=BF16, rows=3, vocab=8, passes=passes)
    sizes = []
    for name in ("copy_", "mul_"):
        monkeypatch.setattr(torch.Tensor, name, lambda x, other: sizes.append(2 * x.nbytes))
    monkeypatch.setattr(torch, "sum", lambda x: sizes.append(x.nbytes))
    ceilings.streaming(case).run()
    assert sizes == [case.moved_bytes]


def test_measuring_keeps_the_best(monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64, 1 << 20)})
    monkeypatch.setattr(ceilings, "FMA_ROUNDS", 1000)
    c = Ceilings(Cpu())
    c.measure({BF16})
    assert set(c.gemm) == {"float32", "bfloat16"} and c.memory > 0
    c.memory = c.gemm["float32"] = 1e18
    c.measure({BF16})
    assert c.memory == c.gemm["float32"] == 1e18
    assert c.document()["memory_bytes"] == 1e18


def test_a_product_that_is_emulated_is_measured_small(monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64, 1 << 20)})
    monkeypatch.setattr(ceilings, "FMA_ROUNDS", 1000)
    monkeypatch.setattr(ceilings, "EMULATED_SECONDS", 0.0)
    sizes = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: sizes.append(len(a)) or mm(a, b, out=out))
    Ceilings(Cpu()).measure({BF16})
    assert set(sizes) == {16}


def test_registers_are_no_slower_than_a_matrix_product():
    flops = max(ceilings.fma_flops(1) for _ in range(3))
    if flops == 0:
        pytest.skip("no compiler")
    assert flops > 1e9
