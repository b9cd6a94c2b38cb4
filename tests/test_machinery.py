"""PyTorch's machinery around whole programs: ahead-of-time compilation and data parallelism."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastattn

VOCAB = 17


class Model(nn.Module):
    """A layer of attention and a head, with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 3 * 16)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        hidden = fastattn.attention(q, k, v, causal=True).flatten(2)
        fused = fastattn.linear_cross_entropy(
            hidden, self.head.weight, target, linear_bias=self.head.bias
        )
        return fused + fastattn.cross_entropy(self.head(hidden), target)


def batch(size: int, seqlen: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, seqlen, 16, generator=generator)
    return x, torch.randint(VOCAB, (size, seqlen), generator=generator)


@pytest.mark.slow  # half a minute of g++
def test_aot_inductor(tmp_path: Path) -> None:
    """A package compiled ahead of time, for any length, runs our operators."""
    model = Model().eval()
    seqlen = torch.export.Dim("seqlen", min=2, max=256)
    with torch.no_grad():
        program = torch.export.export(model, batch(2, 9), dynamic_shapes=({1: seqlen}, {1: seqlen}))
        file = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(file)
        for length in (9, 33):
            inputs = batch(2, length)
            torch.testing.assert_close(loaded(*inputs), model(*inputs))


def train_on(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    x, target = batch(4, 9)
    model(x[2 * rank : 2 * rank + 2], target[2 * rank : 2 * rank + 2]).backward()
    grads = [p.grad for p in model.parameters()]
    torch.save(grads, f"{folder}/{rank}.pt")
    dist.barrier()  # no rank leaves while the other still talks to it
    os._exit(0)  # gloo's teardown aborts one run in four, with any module and without fastattn


def test_data_parallel_gradients_are_the_whole_batchs(tmp_path: Path) -> None:
    """DDP's hooks see our gradients: two processes with half a batch each, over gloo."""
    mp.spawn(train_on, args=(f"file://{tmp_path}/store", str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    model = Model()
    model(*batch(4, 9)).backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pt")
        for grad, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad)


def test_a_model_on_meta_trains() -> None:
    """Shapes alone, both passes."""
    with torch.device("meta"):
        model = Model()
        x = torch.empty(2, 9, 16)
        model(x, torch.empty(2, 9, dtype=torch.int64)).backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
