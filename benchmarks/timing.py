"""Who is faster: all are called in turn, A B C A B C …, so that what else happens hits all alike.

Only quiet rounds count: those in which a probe of known speed ran at 90 % of its best or more, and
in which others (processes, or a virtual machine's host) took less than 2 % of the processors' time.
Where there are too few, it goes on for up to four times as long, and then keeps the best half.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from .case import Call
from .device import Device

MAX_ROUNDS = 1000
MIN_ROUNDS = 5
PATIENCE = 4  # times the seconds wanted, where quiet rounds are rare


@dataclass
class Timing:
    """Seconds a call."""

    median: float
    lower: float  # quartiles
    upper: float
    best: float
    quiet_rounds: int  # that these are of
    rounds: int


@dataclass
class Round:
    probe: float  # seconds
    stolen: float  # share of the processors' time
    times: dict[str, float]  # seconds of each


def one_round(device: Device, calls: Mapping[str, Call], cold: bool) -> Round:
    start, stolen = time.perf_counter(), device.stolen_seconds()
    probe = device.probe()
    times = device.times(calls, cold)
    elapsed = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return Round(probe, (device.stolen_seconds() - stolen) / elapsed, times)


def interleave(
    device: Device,
    calls: Mapping[str, Call],
    seconds: float,
    *,
    cold: bool = True,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, Timing]:
    """Time warm calls for about `seconds` in all; up to PATIENCE times that on a noisy machine."""
    rounds: list[Round] = []
    quiet: list[Round] = []
    start = time.perf_counter()
    while len(rounds) < MAX_ROUNDS:
        elapsed = time.perf_counter() - start
        if elapsed > seconds and len(quiet) >= min_rounds:
            break
        if elapsed > PATIENCE * seconds and len(rounds) >= min_rounds:
            break
        rounds.append(one_round(device, calls, cold))
        best = min(r.probe for r in rounds)
        quiet = [r for r in rounds if r.probe <= best / 0.9 and r.stolen < 0.02]
    if len(quiet) < min_rounds:
        quiet = sorted(rounds, key=lambda r: r.stolen)[: (len(rounds) + 1) // 2]
    return {name: timing([r.times[name] for r in quiet], len(rounds)) for name in calls}


def timing(seconds: list[float], rounds: int) -> Timing:
    t = sorted(seconds)
    quartiles = t[len(t) // 4], t[3 * len(t) // 4]
    return Timing(statistics.median(t), *quartiles, t[0], len(t), rounds)
