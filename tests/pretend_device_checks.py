"""What tests/test_pretend_device.py runs in a process of its own: a registered device stays, and
all that asks torch for its devices then meets it."""

from __future__ import annotations

from collections.abc import Iterator

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


def test_the_cpus_tensors_are_refused(device: torch.device) -> None:
    x, y = torch.ones(3), torch.ones(3, device="cpu")
    with pytest.raises(RuntimeError, match="on the device, not on cpu"):
        x + y
    assert (x + torch.tensor(1.0, device="cpu")).device == device  # a number
    assert torch.equal(x.cpu(), y)
    assert (x.copy_(2 * y) == 2).all()
