"""Watches what kernels in Triton's interpreter read and write: bounds, and races between programs.

Programs run one after another there, so that a race is no wrong number; but each access is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

# arguments that are the pointers and the mask of each access
ACCESSES = {
    "create_masked_load": ("load", 0, 1),
    "create_masked_store": ("store", 0, 2),
    "create_atomic_rmw": ("atomic", 1, 3),
}


class Watch:
    """Of one launch: addresses by kind of access, with the last program that had one."""

    def __init__(self) -> None:
        self.extents: list[tuple[int, int]] = []
        self.programs: dict[str, dict[int, tuple[int, ...]]] = {}
        self.launches = 0

    def start(self, arguments: Any) -> None:
        self.extents = [
            (t.data_ptr(), t.data_ptr() + extent_of(t)) for t in tensors_in(arguments) if t.numel()
        ]
        self.programs = {"load": {}, "store": {}, "atomic": {}}
        self.launches += 1

    def access(self, kind: str, builder: InterpreterBuilder, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data).astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        addresses = addresses.ravel()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for begin, end in self.extents:
            inside |= (addresses >= begin) & (addresses + size <= end)
        program = tuple(int(i) for i in builder.grid_idx)
        assert inside.all(), f"{kind} outside all arguments by program {program}"
        if kind == "store":
            assert len(np.unique(addresses)) == len(addresses), "two lanes store to one address"
        for address in addresses.tolist():
            for other, seen in self.programs.items():
                if "store" in (kind, other) and seen.get(address, program) != program:
                    raise AssertionError(
                        f"programs {seen[address]} and {program} race: {other}, {kind}"
                    )
            self.programs[kind][address] = program


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors_in(argument)


def extent_of(t: Tensor) -> int:
    """Bytes from its first to its last element."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Asserts of every launch that it keeps to its arguments, and that no program writes what
    another one reads or writes, but by atomics only."""
    watch = Watch()
    run = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.start((*args, *kwargs.values()))
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        for name, (kind, pointers, mask) in ACCESSES.items():
            old = getattr(InterpreterBuilder, name)
            patch.setattr(InterpreterBuilder, name, watching(watch, old, kind, pointers, mask))
        yield watch


def watching(watch: Watch, old: Any, kind: str, pointers: int, mask: int) -> Any:
    def access(self: Any, *args: Any) -> Any:
        watch.access(kind, self, args[pointers], args[mask])
        return old(self, *args)

    return access
