"""How fast a run goes through its schedule, and how many steps fit into the time it is given.

A schedule of learning rates is over config.steps positions. Without a time limit each step goes on
by one. With one, steps are timed under way, and what is left of the schedule is spread over as many
steps as fit: the rate always falls to its end, however noisy the machine was at the start or is
later. Position and stride are part of a checkpoint, so that a run is resumed bit for bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

TIME_USED = 0.94  # of the limit: the rest is for saving, and jitter
FIRST = 0.02  # share of the time after which steps are counted first
SOONER = 0.25  # share of what is left after which, at the latest, they are counted again
FORWARD = 1 / 3  # what a token of an evaluation takes of one in training


@dataclass
class Pace:
    """Where a run is on its schedule."""

    length: int  # positions of the schedule
    steps: int  # that the run takes in all
    position: float = 0.0  # of the next step
    stride: float = 1.0  # positions a step
    timed: bool = False  # steps is what fits into a time, not a guess

    def advance(self) -> None:
        self.position += self.stride

    def retime(self, step: int, left: int, rate: Callable[[float], float]) -> None:
        """After `step` steps, reach the schedule's end in `left` more.

        Where the rate is flat, at once to the position of a run of so many steps from the start: so
        the flat part is as long as it would have been, had that been known.
        """
        self.steps, self.timed = step + left, True
        even = self.length * step / self.steps
        if rate(even) == rate(self.position):
            self.position = even
        if left:
            self.stride = (self.length - self.position) / left

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "length"}


class TimeLimit:
    """Tells now and then how many steps more there is time for, by the mean of those just taken.

    First soon, then at intervals that double, towards the end ever sooner: an estimate made in a
    noisy moment is soon replaced, and one that proves too high costs little time.

    seconds: of the whole run, from `begin` on (of time.perf_counter).
    evaluation: tokens of one over tokens of a training step; `every` so many steps (0 = never) and
    at the end there is one.
    """

    def __init__(self, seconds: float, begin: float, *, evaluation: float, every: int) -> None:
        self._begin, self._end = begin, begin + TIME_USED * seconds
        self._next = begin + FIRST * seconds
        self._evaluation, self._every = FORWARD * evaluation, every
        self._times: list[float] = []

    def left(self, seconds: float) -> int | None:
        """After a step that took `seconds`: how many more, or None to leave it as it is."""
        self._times.append(seconds)
        now = time.perf_counter()
        if now < self._next:
            return None
        mean = statistics.fmean(self._times)
        self._times.clear()
        left = max(0.0, self._end - now)
        self._next = now + min(now - self._begin, SOONER * left)
        steps = left / mean - self._evaluation
        return max(0, int(steps / (1 + self._evaluation / self._every if self._every else 1)))
