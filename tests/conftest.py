"""Seeds every test, skips `gpu` tests without a device, and gives tests the backends to hold to.

Tests with a `backend` argument make their tensors on torch's default device, which is where that
backend's kernels want them.
"""

from __future__ import annotations

import collections
import os
import random
from collections.abc import Iterator

import torch

# Triton reads it once, when it is imported, which torch may do.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import emulated
import numpy as np
import pretend_device
import public
import pytest

from fastattn import backends, library

# The architectures that kernels are chosen by. Those of decoding and the losses are the same for
# all of them but for how much shared memory there is.
EMULATED = (80, 75)
HOPPER = 90  # its own kernels have tests of their own; here it is slow
FOR_GPUS = ("cuda", "triton")

# Deterministic algorithms, which `poisoned` asks for, need it of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        metavar="NAME",
        help="backends that tests with a `backend` argument run on; default: all there are here",
    )
    parser.addoption(
        "--device",
        help="where tests with a `backend` argument make their tensors; default: a GPU, if there is"
        " one, for backends of GPUs, else the CPU; `pretend` is tests/pretend_device.py's",
    )


def device_for(backend: str) -> str:
    return "cuda" if backend in FOR_GPUS and torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` goes over the table's rows that are usable here, and `emulated` tests' over the
    emulated architectures too, as cuda-sm80, cuda-sm75, and over Triton's interpreter. `--backend
    cuda` is a GPU where there is one, and the emulator elsewhere."""
    if "backend" in metafunc.fixturenames:
        names = [row.name for row in backends.TABLE if usable(row)]
        emulated_too = metafunc.definition.get_closest_marker("emulated") is not None
        if emulated_too and "threads" not in metafunc.fixturenames:  # threads are the CPU's
            names += [f"cuda-sm{arch}" for arch in (*EMULATED, HOPPER)]
        elif "triton" in names and device_for("triton") == "cpu":
            names.remove("triton")
        if wanted := metafunc.config.getoption("--backend"):
            whole = {name for name in wanted if name in names}
            names = [n for n in names if n in wanted or n.split("-")[0] in set(wanted) - whole]
        metafunc.parametrize(
            "backend", [pytest.param(n, marks=marks_of(n)) for n in names], indirect=True
        )


def usable(row: backends.Backend) -> bool:
    """Not the emulator, should this process have one: that is asked for by architecture."""
    return row.unusable() is None and not (row.name == "cuda" and library.emulated())


def marks_of(backend: str) -> list[pytest.MarkDecorator]:
    if device_for(backend) == "cuda":
        return [pytest.mark.gpu]
    slow = {f"cuda-sm{arch}" for arch in (*EMULATED[1:], HOPPER)}
    return [pytest.mark.slow] if backend in slow else []


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name that a public function's `backend` argument takes."""
    device = request.config.getoption("--device") or device_for(request.param)
    name, _, arch = request.param.partition("-sm")
    if arch:
        emulate(int(arch), monkeypatch)
    if device == pretend_device.NAME:
        pretend_device.register()
    torch.set_default_device(None if device == "cpu" else device)
    yield name
    torch.set_default_device(None)


@pytest.fixture(params=EMULATED, ids="sm{}".format)
def emulated_arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """backend="cuda" takes CPU tensors, on the emulator."""
    emulate(request.param, monkeypatch)
    return request.param


def emulate(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := emulated.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FASTATTN_EMULATE", str(emulated.build()))
    monkeypatch.setenv("FASTATTN_EMULATE_ARCH", str(arch))
    assert library.cuda_load_error() is None


@pytest.hookimpl(tryfirst=True)  # before those marked slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    thin_out_interpreted(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def thin_out_interpreted(items: list[pytest.Item]) -> None:
    """Of a test's cases in Triton's interpreter one dtype each, in turn, is not slow."""
    seen: dict[str, list[str]] = collections.defaultdict(list)
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        interpreted = params.get("backend") == "triton" and device_for("triton") == "cpu"
        if interpreted and {"case", "dtype"} <= params.keys():
            cases = seen[item.nodeid.split("[")[0]]
            if str(params["case"]) not in cases:
                cases.append(str(params["case"]))
            if params["dtype"] != public.KERNEL_DTYPES[cases.index(str(params["case"])) % 3]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models are quicker without company."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """What decides on kernels: left behind, it would quietly change what later tests run."""
    names = ("FASTATTN_", "ATEN_", "MKL_", "ONEDNN_", "OMP_")

    def chosen() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(names)}

    before = chosen()
    yield
    assert chosen() == before


@pytest.fixture(autouse=True)
def seed_all() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
