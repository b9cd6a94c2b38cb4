"""How everything here is timed: competitors interleaved in one process on the same values,
medians, a floor beside each.

A round calls every competitor once, A B C A B C …, so that what else the machine does hits all
alike; a matrix product of known speed is timed in every round too, and rounds in which it ran below
90 % of its best are dropped (at least half are kept). Errors are against fp64. Results go to JSON
stamped with all one needs to know about the machine.
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
    rounds: int  # kept


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


def interleave(
    competitors: dict[str, Competitor], seconds: float, min_rounds: int = 5
) -> dict[str, Timing]:
    """Time all competitors for about `seconds` in all."""
    probe_a, probe_b, probe_c = (torch.randn(512, 512) for _ in range(3))
    times: dict[str, list[float]] = {name: [] for name in competitors}
    probes: list[float] = []
    for c in competitors.values():  # warm-up
        if c.before:
            c.before()
        c.run()
    end = time.perf_counter() + seconds
    while len(probes) < min_rounds or (time.perf_counter() < end and len(probes) < 1000):
        probes.append(_time(lambda: torch.mm(probe_a, probe_b, out=probe_c)))
        for name, c in competitors.items():
            if c.before:
                c.before()
            times[name].append(_time(c.run))
    order = sorted(range(len(probes)), key=probes.__getitem__)
    quiet = [i for i in order if probes[i] <= probes[order[0]] / 0.9]
    kept = (
        quiet if len(quiet) >= len(order) // 2 else order[: max(min_rounds // 2, len(order) // 2)]
    )
    timings = {}
    for name, all_times in times.items():
        t = sorted(all_times[i] for i in kept)
        timings[name] = Timing(statistics.median(t), t[len(t) // 4], t[3 * len(t) // 4], len(t))
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
