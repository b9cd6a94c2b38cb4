"""A driver for Triton with an architecture and no GPU: it compiles kernels and launches nothing.

Launchers then go their usual way with CPU tensors, and `compiled` has the machine code of each
kernel that they would have run for the first time. `started` does without the compiler too.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import triton
from fastattn.kernels import (
    attention_bwd,
    attention_decode,
    attention_entropy,
    attention_fwd,
    cross_entropy,
    interpreter,
    kv_cache,
    linear_cross_entropy,
)
from fastattn.kernels.launch import Launch, Launcher
from triton.backends.compiler import GPUTarget

MODULES = (
    attention_fwd,
    attention_bwd,
    attention_decode,
    attention_entropy,
    kv_cache,
    cross_entropy,
    linear_cross_entropy,
)
# bytes that a block may have, by compute capability · 10
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


class Compiled(NamedTuple):
    name: str
    cubin: bytes
    shared: int  # bytes
    seconds: float  # of CPU that its compilation took, ptxas' included


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class FakeDriver:
    """What `triton.runtime.driver.active` is asked for. Its device's number is the architecture,
    since kernels are kept by device."""

    def __init__(self, arch: int):
        self.arch = arch
        self.utils = self
        self.compiled: list[Compiled] = []
        self.launches = 0
        self.since = cpu_seconds()  # the last kernel

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.arch],
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        before, self.since = self.since, cpu_seconds()
        self.compiled.append(Compiled(name, cubin, shared, self.since - before))
        return name, name, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launches += 1

        return launch


def use(arch: int) -> FakeDriver:
    driver = FakeDriver(arch)
    triton.runtime.driver.set_active(driver)
    return driver


class Started(list[list[Any]]):
    """The arguments of all launches, of kernels that nobody compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.planned: list[Launch] = []  # launched for the first time

    def run(self, first: Launch) -> Any:
        self.planned.append(first)
        self.append(first.all_arguments)
        return {(first.programs, 1, 1): lambda *arguments: self.append(list(arguments))}


@contextlib.contextmanager
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """Launchers go their way as on an H100, from the start; also where the interpreter runs."""
    started = Started()
    forget_plans()
    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "running", lambda: False)
        patch.setattr(Launch, "run", lambda self: started.run(self))
        use(90)
        yield started
    triton.runtime.driver.set_active(None)
    forget_plans()


def forget_plans() -> None:
    for module in MODULES:
        for x in vars(module).values():
            if isinstance(x, Launcher):
                x.kept.clear()
