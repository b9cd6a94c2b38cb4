"""Seeds every test, skips `gpu` tests without a device, and gives tests the backends to hold to."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        metavar="NAME",
        help="backends that tests with a `backend` argument run on; default: all usable here",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        from fastattn import backends

        usable = [row.name for row in backends.TABLE if row.unusable() is None]
        metafunc.parametrize("backend", metafunc.config.getoption("--backend") or usable)


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
