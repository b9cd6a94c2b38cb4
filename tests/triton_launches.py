"""Prints what Triton's own launcher asks of the CUDA driver for attention's kernels, with
tests/fake_cuda as the driver: twice each, as a launch that compiles and as one that is looked up.

    TRITON_LIBCUDA_PATH=FOLDER python tests/triton_launches.py     libcuda.so.1 is in FOLDER
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import ctypes
from pathlib import Path

import fake_gpu
import triton_gates
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver


class RealLauncher(fake_gpu.FakeDriver):
    """Of Triton, to a driver that takes everything."""

    launcher_cls = CudaLauncher  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(90)
        self.utils = CudaUtils()  # type: ignore[assignment]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 5


if __name__ == "__main__":
    cuda = ctypes.CDLL(str(Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"))
    cuda.fake_launches.restype = ctypes.c_char_p
    driver.set_active(RealLauncher())
    for problem in ("attention D 80, grouped", "decoding D 128, paged"):
        for time in ("first", "again"):
            triton_gates.PROBLEMS[problem]()
            print(f"{problem}, {time}\n{cuda.fake_launches().decode()}")
