"""How everything here is timed: competitors interleaved in one process on the same values,
medians, a floor beside each.

A round calls every competitor once, A B C A B C …, so that what else the machine does hits all
alike. Only quiet rounds count: those in which a matrix product timed at their start ran at 90 % of
its best or more, and in which a virtual machine's host took less than 2 % of the processors' time.
Where there are too few, it goes on for up to four times as long and then keeps the best half.
Errors are against fp64. Results go to JSON stamped with all one needs to know about the machine.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastattn
from fastattn import library

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass
class Competitor:
    """A way to compute the case. `before` runs untimed ahead of every call, to restore inputs."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None


@dataclasses.dataclass
class Timing:
    """Seconds a call."""

    median: float
    lower: float  # quartiles
    upper: float
    quiet_rounds: int  # that these are of
    rounds: int


@dataclasses.dataclass
class Ceilings:
    """What this machine was measured to do, best of the run, with torch's current thread count."""

    gemm_flops: float = 0.0  # fp32 matrix product, FLOP/s
    read_bytes: float = 0.0  # streaming read of memory, B/s

    def measure(self) -> None:
        a, b, c = (torch.randn(2048, 2048) for _ in range(3))
        big = torch.ones(64 << 20)  # 256 MiB: larger than any cache met so far
        for _ in range(5):
            self.gemm_flops = max(
                self.gemm_flops, 2 * 2048**3 / _time(lambda: torch.mm(a, b, out=c))
            )
            self.read_bytes = max(self.read_bytes, big.numel() * 4 / _time(lambda: torch.sum(big)))


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def stolen_seconds() -> float:
    """Processor time that the host of a virtual machine has given to others (Linux), all CPUs."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    return int(stat.read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass
class Round:
    probe: float  # seconds the matrix product took
    stolen: float  # share of the processors' time
    times: dict[str, float]  # seconds of each competitor


def _round(competitors: dict[str, Competitor], probe: Callable[[], object]) -> Round:
    start, stolen = time.perf_counter(), stolen_seconds()
    probe_time, times = _time(probe), {}
    for name, c in competitors.items():
        if c.before:
            c.before()
        times[name] = _time(c.run)
    elapsed = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return Round(probe_time, (stolen_seconds() - stolen) / elapsed, times)


def interleave(
    competitors: dict[str, Competitor], seconds: float, min_rounds: int = 5
) -> dict[str, Timing]:
    """Time all competitors for about `seconds` in all; up to four times that on a noisy machine."""
    a, b, c = (torch.randn(512, 512) for _ in range(3))

    def probe() -> None:
        torch.mm(a, b, out=c)

    _round(competitors, probe)  # warm-up
    rounds: list[Round] = []
    quiet: list[Round] = []
    start = time.perf_counter()
    while len(rounds) < 1000:
        elapsed = time.perf_counter() - start
        if elapsed > seconds and len(quiet) >= min_rounds:
            break
        if elapsed > 4 * seconds and len(rounds) >= min_rounds:
            break
        rounds.append(_round(competitors, probe))
        best = min(r.probe for r in rounds)
        quiet = [r for r in rounds if r.probe <= best / 0.9 and r.stolen < 0.02]
    if len(quiet) < min_rounds:
        quiet = sorted(rounds, key=lambda r: r.stolen)[: (len(rounds) + 1) // 2]
    timings = {}
    for name in competitors:
        t = sorted(r.times[name] for r in quiet)
        timings[name] = Timing(
            statistics.median(t), t[len(t) // 4], t[3 * len(t) // 4], len(t), len(rounds)
        )
    return timings


def max_error(x: Tensor, ref64: Tensor) -> float:
    return float((x.detach().double() - ref64).abs().max())


def machine() -> dict:
    """Everything a reader needs to judge the figures."""
    cpu = platform.processor() or "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": library.cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "fastattn": fastattn.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "environment": {
            k: v
            for k, v in os.environ.items()
            if k.startswith(("FASTATTN_", "OMP_", "THP_", "MKL_"))
        },
    }


def write_json(path: Path, ceilings: Ceilings, results: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "ceilings": dataclasses.asdict(ceilings), "results": results}
    path.write_text(json.dumps(document, indent=1) + "\n")
