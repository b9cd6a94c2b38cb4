"""A driver for Triton with an architecture and no GPU: it compiles kernels and launches nothing.

Launchers then go their usual way with CPU tensors, and `launched` has the kernels that they would
have run, as compiled for the architecture.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


class FakeDriver:
    """What `triton.runtime.driver.active` is asked for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = self
        self.launched: list[Any] = []
        self.binary = b""

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.target.arch],
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, name, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            self.launched.append(metadata)

        return launch


def use(arch: int) -> FakeDriver:
    driver = FakeDriver(arch)
    triton.runtime.driver.set_active(driver)
    return driver
