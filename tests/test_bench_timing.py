"""Which rounds count."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.case import Call


class Scripted:
    """A device whose probe, stolen time and calls take what a script says."""

    torch_device = torch.device("cpu")

    def __init__(self, probes, times, steals=()):
        self.probes, self.given, self.steals = iter(probes), iter(times), dict(steals)
        self.round, self.stolen = 0, 0.0

    def probe(self):
        self.stolen += self.steals.get(self.round, 0.0)
        self.round += 1
        return next(self.probes)

    def times(self, calls, cold):
        value = next(self.given)
        return {name: value * (i + 1) for i, name in enumerate(calls)}

    def stolen_seconds(self):
        return self.stolen

    def peak_bytes(self, function):
        return None


CALLS = {name: Call(int, lambda _: {}) for name in "ab"}


@pytest.fixture
def ticking(monkeypatch):
    """A clock that moves on by a second each time it is read: three times a round."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(timing, "time", clock)


def test_only_quiet_rounds_count(ticking):
    probes = [1.0, 1.3, 1.0, 1.0, 1.0, 1.0, 1.0]
    device = Scripted(probes, [1, 90, 2, 3, 80, 4, 5], steals={4: 1.0})
    found = timing.interleave(device, CALLS, seconds=12)
    assert found["a"] == timing.Timing(3, 2, 4, best=1, quiet_rounds=5, rounds=7)
    assert found["b"].median == 6


def test_where_none_is_quiet_the_better_half_counts(ticking):
    device = Scripted([1.0 + 0.2 * i for i in range(5)], [1, 2, 3, 4, 5])
    device.stolen_seconds = iter([0.0] * 2 + [float(x) for x in range(20, 1, -1)]).__next__
    found = timing.interleave(device, CALLS, seconds=0)
    assert found["a"].rounds == 5 and found["a"].quiet_rounds == 3


def test_quartiles():
    assert timing.timing([5, 1, 3, 2, 4], 9) == timing.Timing(3, 2, 4, 1, 5, 9)
    assert timing.timing([7.0], 1).median == pytest.approx(7)
