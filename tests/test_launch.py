"""Kernels' launches: planned once for problems of a form, then the same but for the tensors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import backend_triton
from fastattn.problem import AttentionProblem, CrossEntropyProblem, DecodeProblem

if (reason := backend_triton.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

import fake_gpu
from fake_gpu import Started
from fastattn.kernels import attention_fwd, launch
from fastattn.kernels.attention_bwd import attn_bwd
from fastattn.kernels.attention_decode import attn_decode
from fastattn.kernels.attention_fwd import attn_fwd
from fastattn.kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd
from fastattn.kernels.launch import Launcher


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    with fake_gpu.started(monkeypatch) as started:
        yield started


def leaves(arguments: Any) -> list[Any]:
    """Numbers, and which tensors they are."""
    found: list[Any] = []
    for x in arguments:
        if isinstance(x, tuple):
            found += leaves(x)
        else:
            found.append((x.data_ptr(), x.shape, x.stride()) if isinstance(x, Tensor) else x)
    return found


def attention(**options: Any) -> None:
    q, k, v = (torch.randn(2, 5, 2, 8) for _ in range(3))
    p = AttentionProblem(q, k, v, **options)
    out, lse = attn_fwd(p)
    attn_bwd(p, out, lse, torch.ones_like(out), torch.ones_like(lse), False)


def rich_attention() -> None:
    attention(
        mask=torch.ones(2, 1, 5, 5, dtype=torch.bool), bias=torch.randn(1, 2, 5, 5),
        alibi_slopes=torch.randn(2), sinks=torch.randn(2), seed=torch.tensor(1),
        window_left=3, softcap=2.0, dropout_p=0.5,
    )  # fmt: skip


def packed_attention() -> None:
    q, k, v = (torch.randn(10, 2, 8) for _ in range(3))
    offsets = [torch.tensor([0, 4, 10], dtype=torch.int32) for _ in range(2)]
    p = AttentionProblem(q, k, v, None, None, None, None, None, *offsets, 6, 6)
    out, lse = attn_fwd(p)
    attn_bwd(p, out, lse, torch.ones_like(out), None, False)


def decoding() -> None:
    cache, new = (torch.randn(3, n, 2, 8) for n in (1024, 1))
    p = DecodeProblem(
        torch.randn(3, 1, 4, 8), cache, cache.clone(), torch.tensor([1, 2, 3], dtype=torch.int32),
        new, new.clone(), sinks=torch.randn(4),
    )  # fmt: skip
    attn_decode(p)


def losses() -> None:
    logits, target = torch.randn(3, 50), torch.tensor([1, 2, 3])
    p = CrossEntropyProblem(logits, target, torch.rand(50), label_smoothing=0.1)
    cross_entropy_fwd(p, torch.tensor(1.0), logits)
    cross_entropy_bwd(p, torch.randn(3), torch.randn(3), None)


RUNS: tuple[tuple[Callable[[], None], int], ...] = (
    (attention, 3),
    (rich_attention, 3),
    (packed_attention, 3),
    (decoding, 3),
    (losses, 2),
)


@pytest.mark.parametrize("run, kernels", RUNS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_plan_gives_what_planning_again_would(
    run: Callable[[], None], kernels: int, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, expected = Launcher.__call__, []

    def planned_again(self: Launcher, problem: Any, *others: Any) -> None:
        call(self, problem, *others)
        expected.append(self.plan(self.tile(problem, *others), problem, *others).all_arguments)

    monkeypatch.setattr(Launcher, "__call__", planned_again)
    for _ in range(3):
        run()
    assert (len(started), len(started.planned)) == (3 * kernels, kernels)
    for got, wanted in zip(started, expected, strict=True):
        assert leaves(got) == leaves(wanted)


def test_tensors_that_were_one_may_be_two(started: Started) -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    attn_fwd(AttentionProblem(q, q, q))
    attn_fwd(AttentionProblem(q, k, v))
    assert len(started.planned) == 1
    assert [heads[0].data_ptr() for heads in started[1][:3]] == [t.data_ptr() for t in (q, k, v)]


def test_what_a_kernel_is_compiled_for_makes_another_plan(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = torch.zeros(1000)
    q = memory[:80].view(1, 5, 2, 8)
    odd = memory[81:161].view(1, 5, 2, 8)  # not a multiple of 16 bytes
    p = AttentionProblem(q, q, q)
    problems = [
        p,
        p._replace(q=odd),
        p._replace(k=memory[:160].view(1, 5, 2, 16)[..., :8]),
        p._replace(q=q.half(), k=q.half(), v=q.half()),
        p._replace(scale=0.5),
        p._replace(window_right=0),
        p._replace(sinks=torch.zeros(2)),
    ]
    for i, problem in enumerate(problems):
        attn_fwd(problem)
        attn_fwd(problem)
        assert len(started.planned) == i + 1
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    attn_fwd(p)
    assert len(started.planned) == len(problems) + 1
    fake_gpu.use(120)
    attn_fwd(p)
    assert len(started.planned) == len(problems) + 2


def test_plans_hold_no_tensors_and_are_not_kept_without_end(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    fwd = attention_fwd._fwd
    monkeypatch.setattr(launch, "MOST_PLANS", 4)
    for seqlen in range(1, 8):
        q = torch.randn(1, seqlen, 2, 8)
        attn_fwd(AttentionProblem(q, q, q))
        assert len(fwd.kept) <= 4

    def tensors_in(x: Any) -> bool:
        return isinstance(x, Tensor) or (isinstance(x, list | tuple) and any(map(tensors_in, x)))

    assert fwd.kept and not any(tensors_in(planned.arguments) for planned in fwd.kept.values())
    assert not any(map(tensors_in, fwd.kept))


def test_nothing_to_do_is_no_launch(started: Started) -> None:
    q, k = torch.randn(0, 5, 2, 8), torch.randn(0, 5, 2, 8)
    for _ in range(2):
        attn_fwd(AttentionProblem(q, k, k))
    assert not started


def test_tritons_own_launcher_takes_the_arguments(tmp_path: Path) -> None:
    """The C code that it compiles for a driver, which here is tests/fake_cuda: of a first launch
    and of one that is looked up."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("there is no g++")
    here, triton_folder = Path(__file__).parent, Path(str(launch.triton.__file__)).parent
    driver = tmp_path / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(driver)]
    command += [f"-I{triton_folder}/backends/nvidia/include", str(here / "fake_cuda/libcuda.cpp")]
    subprocess.run(command, check=True)
    (tmp_path / "libcuda.so").symlink_to(driver)  # Triton links with it
    paths = {"TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, str(here / "triton_launches.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)
    assert done.returncode == 0, done.stderr
    told = dict(part.split("\n", 1) for part in done.stdout.strip().split("\n\n"))
    assert len(told) == 4
    for what, launches in told.items():
        assert launches == told[what.replace("again", "first")]
    attention, decoding = (told[f"{what}, first"].splitlines() for what in PROBLEMS)
    assert [line.split(":")[0] for line in attention] == [
        "attn_fwd_kernel", "attn_bwd_dq_kernel", "attn_bwd_dkv_kernel", "attn_entropy_kernel",
    ]  # fmt: skip
    assert attention[0].startswith("attn_fwd_kernel: 256 × 256, ")
    assert all(line.endswith(", stream 5") for line in (*attention, *decoding))


PROBLEMS = ("attention D 80, grouped", "decoding D 128, paged")  # of triton_launches.py
