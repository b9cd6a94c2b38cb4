"""Peaks of devices and FLOPs of attention."""

import pytest
import torch

from fastattn import flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_gpu_peaks(name, tflops):
    peak = flops.gpu_peak(name)
    assert peak is not None
    assert peak.flops == tflops * 1e12
    assert name in peak.source


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 D", "Quadro T400", "AMD Instinct MI300X"]
)
def test_unknown_gpu_has_no_peak(name):
    assert flops.gpu_peak(name) is None


def test_cpu_peak_is_measured():
    peak = flops.measured_cpu_peak(torch.float32, size=128, seconds=0.02)
    if peak is not None:  # None: the machine is too busy to tell
        assert peak.flops > 1e8
        assert "float32 128³" in peak.source


def test_unsettled_measurement_is_no_peak():
    assert flops.settled_best([0.013, 0.010, 0.0105]) == 0.010
    assert flops.settled_best([0.010, 0.012, 0.015]) is None


def test_peak_of_an_unknown_device_is_unknown():
    assert flops.device_peak(torch.device("mps"), torch.bfloat16) is None


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 1), (0, 0), (-1, 2), (4, -1)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (5, 9), (9, 5), (8, 8), (0, 3)])
def test_visible_pairs_counts(window, seqlen_q, seqlen_k):
    left, right = window
    seen = 0
    for i in range(seqlen_q):
        at = i + seqlen_k - seqlen_q
        for j in range(seqlen_k):
            seen += (left < 0 or j >= at - left) and (right < 0 or j <= at + right)
    assert flops.visible_pairs(seqlen_q, seqlen_k, window) == seen


def test_attention_flops():
    # 2 products of 2·S²·D forward, 5 backward: the familiar 4 B H S² D and 10 B H S² D.
    assert flops.attention_flops(2, 3, 16 * 16, 8) == 4 * 2 * 3 * 16 * 16 * 8
    assert flops.attention_flops(2, 3, 16 * 16, 8, backward=True) == 10 * 2 * 3 * 16 * 16 * 8
    assert flops.attention_flops(1, 1, 1, 8, 4) == 2 * (8 + 4)
    assert flops.attention_flops(1, 1, 1, 8, 4, backward=True) == 2 * (3 * 8 + 2 * 4)
