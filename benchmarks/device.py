"""How calls are timed on a CPU and on a CUDA GPU: one interface, so that all else is the same.

On a GPU times are between CUDA events. Before each call its L2 cache is overwritten, and the stream
is kept busy for a moment, so that kernels are queued before their time begins: the time is the
device's, without the host's launch overhead. On a CPU the time is all that a caller waits.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from fastattn.memory import peak_memory

from .case import Call


class CallFailedError(RuntimeError):
    """A call raised what is this error's cause."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CallFailedError(name) from error


class Device(Protocol):
    torch_device: torch.device

    def times(self, calls: Mapping[str, Call], cold: bool) -> dict[str, float]:
        """Seconds of each, called once in turn; with `cold` nothing is left in caches.

        Raises CallFailedError where one of them fails.
        """

    def probe(self) -> float:
        """Seconds of something that always takes alike, unless the machine is busy."""

    def stolen_seconds(self) -> float:
        """Processor time that others have taken so far, of all cores together."""

    def peak_bytes(self, function: Callable[[], object]) -> int | None: ...


class Cpu:
    """Caches are not cleared: what the calls in between leave in them is what they find."""

    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self._a, self._b, self._c = (torch.randn(512, 512) for _ in range(3))

    def times(self, calls: Mapping[str, Call], cold: bool) -> dict[str, float]:
        seconds = {}
        for name, call in calls.items():
            with named(name):
                if call.before is not None:
                    call.before()
                start = time.perf_counter()
                call.run()
                seconds[name] = time.perf_counter() - start
        return seconds

    def probe(self) -> float:
        start = time.perf_counter()
        torch.mm(self._a, self._b, out=self._c)
        return time.perf_counter() - start

    def stolen_seconds(self) -> float:
        """What a virtual machine's host has given to others, and our threads' waits for a core.

        Linux counts both; elsewhere 0.
        """
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0
        stolen = int(stat.read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")
        return stolen + sum(map(waited, Path("/proc/self/task").glob("*/schedstat")))

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        return peak_memory(function)


def waited(schedstat: Path) -> float:
    """Seconds that a thread could have run, but other processes had its core."""
    try:
        return int(schedstat.read_text().split()[1]) / 1e9
    except (OSError, IndexError):  # it has ended, or this Linux does not count
        return 0.0


class Cuda:
    """`cuda` is torch.cuda; tests put something in its place that needs no GPU."""

    BUSY_CYCLES = 1_000_000  # about half a millisecond: longer than Python takes to launch a call

    def __init__(self, cuda: Any = torch.cuda, device: str = "cuda") -> None:
        self.torch_device = torch.device(device)
        self._cuda = cuda
        l2_bytes = cuda.get_device_properties(self.torch_device).L2_cache_size
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device=self.torch_device)

    def times(self, calls: Mapping[str, Call], cold: bool) -> dict[str, float]:
        events = {}
        for name, call in calls.items():
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            with named(name):
                if call.before is not None:
                    call.before()
                if cold:
                    self._flush.zero_()
                    self._cuda._sleep(self.BUSY_CYCLES)
                start.record()
                call.run()
                end.record()
            events[name] = start, end
        self._cuda.synchronize()
        return {name: 1e-3 * start.elapsed_time(end) for name, (start, end) in events.items()}

    def probe(self) -> float:
        return 1.0  # nobody else is on it

    def stolen_seconds(self) -> float:
        return 0.0

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        return peak_memory(function, self.torch_device)


def find(kind: str | None) -> Device:
    """The device of this name, or None for the best there is. Raises RuntimeError if absent."""
    available = torch.cuda.is_available()
    if kind == "cuda" and not available:
        raise RuntimeError("--device cuda: torch finds no CUDA device here")
    return Cuda() if kind == "cuda" or (kind is None and available) else Cpu()
