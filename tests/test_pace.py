"""Time limits on a clock that tests move: the time is kept, and the rate falls to its end."""

from functools import partial

import pytest

from fastattn import pace
from fastattn.config import TrainConfig
from fastattn.pace import Pace, TimeLimit
from fastattn.trainer import lr_factor

LIMIT = 180.0


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


def run(monkeypatch, seconds_at, *, steps=10_000, evaluation=0.0, every=0, schedule="wsd"):
    """Seconds that a run takes, and the rate of each step, if a step takes seconds_at(elapsed)."""
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    c = TrainConfig(steps=steps, schedule=schedule, warmup_steps=30, decay=0.6, final_lr=0.0)
    limit = TimeLimit(LIMIT, clock.now, evaluation=evaluation, every=every)
    here, rates = Pace(steps, steps), []
    while len(rates) < here.steps:
        rates.append(lr_factor(c, here.position))
        here.advance()
        took = seconds_at(clock.now - 100)
        clock.now += took
        if (left := limit.left(took)) is not None:
            here.retime(len(rates), min(left, steps - len(rates)), partial(lr_factor, c))
        if (every and len(rates) % every == 0) or len(rates) == here.steps:
            clock.now += took * evaluation * pace.FORWARD
    return clock.now - 100, rates


@pytest.mark.parametrize(
    ("seconds_at", "fit"),
    [
        (lambda elapsed: 0.05, 3384),
        (lambda elapsed: 0.2 if elapsed < 10 else 0.05, 50 + 3184),  # a noisy start
        (lambda elapsed: 0.05 if elapsed < 150 else 0.2, 3000 + 96),  # a slow end
        (lambda elapsed: 0.05 if elapsed < 167 else 0.5, 3340 + 4),  # … that nobody foresaw
    ],
    ids=["even", "noisy start", "slow end", "very late"],
)
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_all_of_the_time_is_used_and_no_more(seconds_at, fit, schedule, monkeypatch):
    elapsed, rates = run(monkeypatch, seconds_at, schedule=schedule)
    assert 0.98 * pace.TIME_USED * LIMIT <= elapsed <= LIMIT
    assert len(rates) == pytest.approx(fit, rel=0.02)
    peak = rates.index(max(rates))
    assert peak <= 30 and rates[peak] > 0.99 and rates[-1] < 0.02
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))


def test_a_noisy_start_hardly_moves_the_schedule(monkeypatch):
    """The rate begins to fall after 40 % of the steps, in the demo's schedule."""
    for noisy in (0.0, 10.0):
        rates = run(monkeypatch, lambda elapsed: 0.2 if elapsed < noisy else 0.05)[1]  # noqa: B023
        assert sum(rate == 1 for rate in rates) / len(rates) == pytest.approx(0.4, abs=0.03)


def test_evaluations_are_counted_in(monkeypatch):
    elapsed, rates = run(monkeypatch, lambda elapsed: 0.05, evaluation=300.0, every=500)
    assert 0.95 * pace.TIME_USED * LIMIT <= elapsed <= LIMIT
    assert len(rates) < 3000


def test_what_fits_is_left_as_it_is(monkeypatch):
    _, rates = run(monkeypatch, lambda elapsed: 0.05, steps=200)
    c = TrainConfig(steps=200, schedule="wsd", warmup_steps=30, decay=0.6, final_lr=0.0)
    assert rates == [lr_factor(c, step) for step in range(200)]


def test_no_time_for_a_second_step(monkeypatch):
    assert len(run(monkeypatch, lambda elapsed: 500.0)[1]) == 1


def test_the_rest_of_the_schedule_is_spread_over_what_is_left():
    here = Pace(100, 100)
    for _ in range(10):
        here.advance()
    here.retime(10, 30, rate=float)
    assert here == Pace(100, 40, position=10.0, stride=3.0, timed=True)
    assert Pace(100, **here.state_dict()) == here
    here.retime(10, 15, rate=lambda position: 1.0)  # as in 25 steps from the start
    assert here == Pace(100, 25, position=40.0, stride=4.0, timed=True)
    here.retime(10, 0, rate=float)
    assert here.steps == 10
