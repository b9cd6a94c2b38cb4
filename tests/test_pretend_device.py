"""The pretended device, and that the shared tests keep to the device they are given."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import emulated
import pretend_device
import pytest
import torch


@pytest.fixture
def device() -> Iterator[torch.device]:
    pretend_device.register()
    torch.set_default_device(pretend_device.NAME)
    yield torch.device(pretend_device.NAME, 0)
    torch.set_default_device(None)


def test_tensors_are_made_and_computed_there(device: torch.device) -> None:
    x = torch.randn(3, 4)
    made = (x, torch.arange(5), torch.tensor(1.0), x @ x.T, x.transpose(0, 1)[1:], x.double())
    assert all(t.device == device for t in made)
    assert torch.equal(x.cpu() @ x.cpu().T, (x @ x.T).cpu())
    assert torch.arange(5).shape == (5,) and torch.arange(5).tolist() == [0, 1, 2, 3, 4]


def test_views_share_memory(device: torch.device) -> None:
    x = torch.zeros(4, 6)
    view = x[1:3, ::2]
    assert view.stride() == (6, 2) and view.storage_offset() == 6
    view.add_(1)
    x[torch.tensor([0])] = 5
    assert x.sum().item() == 6 + 30


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


def test_the_cpus_tensors_are_refused(device: torch.device) -> None:
    x, y = torch.ones(3), torch.ones(3, device="cpu")
    with pytest.raises(RuntimeError, match="on the device, not on cpu"):
        x + y
    assert (x + torch.tensor(1.0, device="cpu")).device == device  # a number
    assert torch.equal(x.cpu(), y)
    assert (x.copy_(2 * y) == 2).all()


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
