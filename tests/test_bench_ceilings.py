"""What a device can do at best, and the floor under a case."""

import pytest
import torch

from benchmarks import ceilings
from benchmarks.ceilings import Ceilings
from benchmarks.device import Cpu
from benchmarks.losses import CrossEntropy, LinearCrossEntropy
from benchmarks.package import Package

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def made_up():
    c = Ceilings(Cpu())
    c.gemm, c.fma, c.memory = {"float32": 100.0, "bfloat16": 300.0}, 200.0, 10.0
    return c


def test_a_floor_is_the_larger_of_compute_and_memory(made_up):
    linear = LinearCrossEntropy(suite="", dtype=FP32, rows=5, channels=3, vocab=7)
    moved = 2 * (5 + 7) * 3 * 4 / 10
    assert made_up.floor(linear) == (moved, "memory")
    made_up.memory = 1e9
    assert made_up.floor(linear) == (6 * 5 * 3 * 7 / 200, "compute")
    assert made_up.floor(CrossEntropy(suite="", dtype=BF16, rows=5, vocab=7))[1] == "memory"
    assert made_up.floor(Package(suite="", what="import")) is None


def test_fp32_registers_are_a_ceiling_for_all_dtypes(made_up):
    assert made_up.flops(FP32) == 200 and made_up.flops(BF16) == 300
    made_up.fma = 1000.0
    assert made_up.flops(BF16) == 1000


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


def test_registers_are_no_slower_than_a_matrix_product():
    flops = max(ceilings.fma_flops(1) for _ in range(3))
    if flops == 0:
        pytest.skip("no compiler")
    assert flops > 1e9
