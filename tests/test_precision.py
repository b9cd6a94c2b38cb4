"""In how many bits a training step computes, by what the device is."""

import pytest
import torch

from fastattn import library, precision

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 1), "fp32")],
)
def test_on_gpus_it_is_what_tensor_cores_take(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.fastest(GPU) == expected


@pytest.mark.parametrize(
    ("isa", "expected"),
    [("avx512_bf16", "bf16"), ("avx512", "fp32"), ("avx2", "fp32"), ("scalar", "fp32")],
)
def test_on_cpus_bf16_only_where_its_products_are_faster(monkeypatch, isa, expected):
    monkeypatch.setattr(library, "load_error", lambda: None)
    monkeypatch.setattr(library, "cpu_isa", lambda: isa)
    assert precision.fastest(CPU) == expected


def test_without_kernels_it_is_fp32(monkeypatch):
    monkeypatch.setattr(library, "load_error", lambda: "fastattn/_C*.so is missing")
    assert precision.fastest(CPU) == "fp32"


@pytest.mark.parametrize("name", precision.DTYPES)
def test_autocast_scaler_and_note_agree(name):
    with precision.autocast(name, CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == precision.DTYPES[name]
    assert precision.gradient_scaler(name, CPU).is_enabled() == (name == "fp16")
    assert name in precision.note(name, CPU)
