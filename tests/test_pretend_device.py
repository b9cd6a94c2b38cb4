"""The pretended device, and that the shared tests keep to the device they are given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import emulated
import pytest


def test_the_device() -> None:
    path = Path(__file__).with_name("pretend_device_checks.py")
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_gradients_arrive_there() -> None:
    """In a process of its own: the first backward pass fixes what devices autograd knows."""
    code = """
import os, torch, pretend_device
pretend_device.register()
x = torch.randn(3, device=pretend_device.NAME, requires_grad=True)
(x * x).sum().backward()
assert x.grad.device == x.device
assert torch.equal(x.grad.cpu(), 2 * x.detach().cpu())
os._exit(0)  # at a usual exit autograd's thread of the device may still run, which aborts
"""
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("held", ["reference", "cuda-sm80"])
def test_public_tests_keep_to_their_device(held: str) -> None:
    """As they will on a GPU, which has no kernels for a tensor left behind on the CPU."""
    if held != "reference" and (reason := emulated.why_not()) is not None:
        pytest.skip(reason)
    files = [f"tests/test_{name}.py" for name in ("attention", "decode", "losses")]
    options = ["-q", "-p", "no:cacheprovider", "--device", "pretend", "--backend", held]
    few = "(everything or strange or place) and not float32"
    chosen = ["-k", f"{held} and ({few})"]
    command = [sys.executable, "-m", "pytest", *files, *options, *chosen]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
