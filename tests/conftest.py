"""Seeds every test, skips `gpu` tests without a device, and gives tests the backends to hold to."""

from __future__ import annotations

import random
from collections.abc import Iterator

import emulated
import numpy as np
import pytest
import torch

# The architectures that kernels are chosen by. Those of decoding and the losses are the same for
# all of them but for how much shared memory there is.
EMULATED = (80, 75)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        metavar="NAME",
        help="backends that tests with a `backend` argument run on; default: all there are here",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` goes over the usable rows of the table for CPU tensors, and `emulated` tests' over
    the emulated architectures too: as cuda-sm80, cuda-sm75."""
    if "backend" in metafunc.fixturenames:
        from fastattn import backends

        names = [r.name for r in backends.TABLE if r.name != "cuda" and r.unusable() is None]
        if metafunc.definition.get_closest_marker("emulated"):
            names += [f"cuda-sm{arch}" for arch in EMULATED]
        if wanted := metafunc.config.getoption("--backend"):
            names = [name for name in names if name in wanted or name.split("-")[0] in wanted]
        slow = {f"cuda-sm{arch}" for arch in EMULATED[1:]}
        params = [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in names]
        metafunc.parametrize("backend", params, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name that a public function's `backend` argument takes."""
    name, _, arch = request.param.partition("-sm")
    if arch:
        emulate(int(arch), monkeypatch)
    return name


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed_all() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
