"""How the CUDA kernels are started: csrc/cuda/launch.cuh over a runtime that is only a fake."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated
import pytest
import torch
from emulator import build
from emulator.runtime import Library
from torch import Tensor

import fastattn

HERE = Path(__file__).parent
CUDA = HERE.parent / "csrc" / "cuda"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which(build.CXX) is None:
        pytest.skip(f"there is no {build.CXX}")
    target = tmp_path_factory.mktemp("fake") / "liblaunch.so"
    source = HERE / "fake_cudart" / "launch.cpp"
    command = [build.CXX, "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unused"]
    subprocess.run([*command, str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.launch_with_fake.restype = ctypes.c_char_p
    library.launch_with_fake.argtypes = [
        *[ctypes.c_int64] * 3, ctypes.c_int, ctypes.c_int, ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_char_p),
    ]  # fmt: skip
    return library


def launched(
    library: ctypes.CDLL,
    blocks: tuple[int, int, int] = (6, 1, 1),
    shared_bytes: int = 0,
    device: int = 0,
    fails: str = "",
) -> tuple[str | None, list[str]]:
    """The error, and what the runtime was asked for, but for the device's attributes."""
    calls = ctypes.c_char_p()
    arguments = (*blocks, shared_bytes, device, fails.encode(), ctypes.byref(calls))
    problem = library.launch_with_fake(*arguments)
    asked = (calls.value or b"").decode().splitlines()
    return problem and problem.decode(), [a for a in asked if not a.startswith("attribute")]


def test_a_launch_goes_to_the_device_and_stream_that_it_is_for(library: ctypes.CDLL) -> None:
    start = "launch 6 1 1 of 64, 0 bytes, argument 7, stream 5"
    assert launched(library) == (None, ["set device 0", start])
    assert launched(library, device=3) == (None, ["set device 3", start])


def test_shared_memory_beyond_48_kib_is_asked_for(library: ctypes.CDLL) -> None:
    for bytes_, extra in ((49152, []), (49168, ["allow 49168"])):
        problem, calls = launched(library, shared_bytes=bytes_)
        assert problem is None and calls[1:-1] == extra and f", {bytes_} bytes" in calls[-1]


@pytest.mark.parametrize("fails", ["launch", "allow"])
def test_an_error_names_kernel_and_shape(library: ctypes.CDLL, fails: str) -> None:
    problem, calls = launched(library, shared_bytes=65536, fails=fails)
    assert problem == "fastattn: attn_fwd of (2, 3): the fake has failed"
    assert calls[-1].startswith(fails)


def test_devices_that_are_not_there(library: ctypes.CDLL) -> None:
    problem, calls = launched(library, fails="set device")
    assert problem == "fastattn: no usable GPU: the fake has failed" and len(calls) == 1
    problem, _ = launched(library, device=64)
    assert problem == "fastattn: there is no GPU number 64"


def test_no_blocks_start_nothing_and_too_many_are_refused(library: ctypes.CDLL) -> None:
    assert launched(library, (0, 1, 1)) == (None, ["set device 0"])
    assert launched(library, (2**31 - 1, 1, 1))[0] is None
    for blocks in ((2**31, 1, 1), (2**32 + 1, 1, 1), (1, 65536, 1), (1, 1, 65536)):
        problem, calls = launched(library, blocks)
        assert problem == "fastattn: attn_fwd of (2, 3): more blocks than a grid takes"
        assert calls == ["set device 0"]


def test_nothing_waits_for_the_device_or_allocates_on_it() -> None:
    """So that CUDA graphs capture every operator: all that csrc/cuda asks of CUDA."""
    text = "".join(file.read_text() for file in sorted(CUDA.glob("*.[ch]*")))
    code = re.sub(r"//.*", "", text)
    assert set(re.findall(r"\b(cuda[A-Z]\w+|cu[A-Z]\w+)\(", code)) == {
        "cudaDeviceGetAttribute",
        "cudaFuncSetAttribute",
        "cudaGetDriverEntryPointByVersion",
        "cudaGetErrorString",
        "cudaLaunchKernel",
        "cudaSetDevice",
    }
    assert "<<<" not in code and "malloc" not in code.lower()


def attention() -> Tensor:
    q = torch.randn(2, 5, 3, 24, dtype=torch.float16, requires_grad=True)
    return fastattn.attention(q, q, q, backend="cuda")


def decode() -> Tensor:
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(2, 9, 2, 16)
    return fastattn.attention_decode(
        q, cache, cache, cache_seqlens=torch.tensor([9, 3], dtype=torch.int32), backend="cuda"
    )


def cross_entropy() -> Tensor:
    logits = torch.randn(2, 70)
    return fastattn.cross_entropy(logits, torch.tensor([1, 2]), backend="cuda")


@pytest.fixture
def no_shared_memory(emulated_arch: int) -> Iterator[Callable[[], None]]:
    """Every launch fails from then on."""
    emulator = Library(emulated.build())
    yield lambda: emulator.set_options("shared_limit=0")
    emulator.set_options()


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (attention, r"attn_fwd, B 2, S 5 × 5, H 3 / 3, D 24 / 24: "),
        (decode, r"attn_decode of \(2, 1, 4, 16\): "),
        (cross_entropy, r"cross_entropy of \(2, 70\): "),
    ],
    ids=["attention", "decode", "cross-entropy"],
)
def test_operators_name_themselves_and_their_shape(
    no_shared_memory: Callable[[], None], run: Callable[[], Tensor], says: str
) -> None:
    no_shared_memory()
    with pytest.raises(RuntimeError, match=says + r"\d+ bytes of shared memory, more than"):
        run()


def test_the_backward_names_itself(no_shared_memory: Callable[[], None]) -> None:
    out = attention()
    no_shared_memory()
    with pytest.raises(RuntimeError, match=r"attn_bwd_dq of .*B 2, S 5 × 5, H 3 / 3, D 24 / 24"):
        out.sum().backward()
