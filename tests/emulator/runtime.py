"""An emulator library in Python: options, the buffers kernels may touch, errors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor


class SharedAccess(NamedTuple):
    """What a line of a kernel did to shared memory, in warps' accesses."""

    place: str  # such as fragments.cuh:59
    instruction: str
    accesses: int
    wavefronts: int
    conflicts: int  # wavefronts beyond one for each 128 bytes of lanes
    uncounted: int  # accesses whose lanes went different ways


class EmulatorError(RuntimeError):
    """What a launch was found guilty of."""


class Library:
    """A library that build.build made. Its own functions are reached through `call`."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_set_options.restype = ctypes.c_char_p
        self._library.emulator_add_buffer.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_char_p,
            ctypes.c_int,
        ]

    def set_options(self, text: str = "") -> None:
        """What holds for the launches that follow, like "lazy,seed=3,races=1"; see options.h."""
        problem = self._library.emulator_set_options(text.encode())
        if problem is not None:
            raise ValueError(problem.decode())

    def passed_places(self) -> list[str]:
        """Where barriers, waits and fences were passed, with the option `without`, since last."""
        self._library.emulator_passed_places.restype = ctypes.c_char_p
        return self._library.emulator_passed_places().decode().split()

    def bank_conflicts(self) -> list[SharedAccess]:
        """Of launches with the option `banks`, since last."""
        self._library.emulator_bank_conflicts.restype = ctypes.c_char_p
        found = []
        for line in self._library.emulator_bank_conflicts().decode().splitlines():
            place, *words = line.split()
            counts = [int(word) for word in words[-4:]]
            found.append(SharedAccess(place, " ".join(words[:-4]), *counts))
        return found

    @contextmanager
    def buffers(
        self, read: Mapping[str, Tensor | None], write: Mapping[str, Tensor | None]
    ) -> Iterator[None]:
        """Global memory is these tensors, by name; kernels may only read the former."""
        try:
            for tensors, writable in ((read, False), (write, True)):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        self.add_buffer(name, tensor, writable)
            yield
        finally:
            self._library.emulator_clear_buffers()

    def add_buffer(self, name: str, tensor: Tensor, writable: bool) -> None:
        """From the tensor's first element to its last, with what a strided one has between."""
        if tensor.numel() == 0:
            return
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in strides)
        self._library.emulator_add_buffer(
            tensor.data_ptr(), elements * tensor.element_size(), name.encode(), writable
        )

    def call(self, function: str, *arguments: object) -> None:
        """Calls a function that returns null or what went wrong, as emulator::guarded does."""
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_char_p
        problem = entry(*arguments)
        if problem is not None:
            raise EmulatorError(problem.decode())
