"""A checkpoint is due by time, and a training asks for the time that it needs to stop."""

import time

import pytest

from deepspec.config.resources import RunnerConfig
from deepspec.train.checkpoint_clock import CheckpointClock


class Time:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def step(self, clock: CheckpointClock, seconds: float) -> None:
        self.now += seconds
        clock.step_ended()

    def checkpoint(self, clock: CheckpointClock, seconds: float) -> None:
        self.now += seconds
        clock.checkpoint_saved()


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def test_the_minutes_begin_with_every_checkpoint(clock_time: Time):
    clock = CheckpointClock(5, num_bytes=0, runner=RunnerConfig())
    clock_time.step(clock, 299)
    assert not clock.is_due()
    clock_time.step(clock, 1)
    assert clock.is_due()
    clock_time.checkpoint(clock, 200)
    assert not clock.is_due()
    clock_time.step(clock, 300)
    assert clock.is_due()
    assert not CheckpointClock(None, num_bytes=0, runner=RunnerConfig()).is_due()


def test_a_stop_takes_a_step_and_two_checkpoints_and_half_as_much_again(clock_time: Time):
    """Of a 4B draft: 45 seconds a step, 10.5 GB a checkpoint."""
    clock = CheckpointClock(30, num_bytes=10_500_000_000, runner=RunnerConfig())
    assert clock.stop_s() == pytest.approx(1.5 * 2 * 52.5), "before anything was measured"
    clock_time.step(clock, 45)
    assert clock.stop_s() == pytest.approx(1.5 * (45 + 2 * 52.5))
    clock_time.checkpoint(clock, 20)
    assert clock.stop_s() == pytest.approx(1.5 * (45 + 2 * 20))
    for _ in range(10):  # the slowest of the last ten counts
        clock_time.step(clock, 2)
    assert clock.stop_s() == pytest.approx(1.5 * (2 + 2 * 20))
    small = CheckpointClock(30, num_bytes=1000, runner=RunnerConfig())
    clock_time.step(small, 0.1)
    assert small.stop_s() == 8, "never less than where nothing is measured"


def test_time_is_asked_for_when_the_one_granted_is_too_short_or_far_too_long(clock_time: Time):
    clock = CheckpointClock(30, num_bytes=0, runner=RunnerConfig())
    assert clock.request() is None, "eight seconds are granted without a request"
    clock_time.step(clock, 40)
    assert clock.request() == 60
    clock_time.step(clock, 30)
    assert clock.request() is None
    clock_time.step(clock, 50)
    assert clock.request() == 75
    for _ in range(10):
        clock_time.step(clock, 10)
    assert clock.request() == 15


def test_the_time_that_a_user_set_stays(clock_time: Time):
    clock = CheckpointClock(30, num_bytes=10**12, runner=RunnerConfig(stop_s=3))
    clock_time.step(clock, 1000)
    assert (clock.stop_s(), clock.request()) == (3, None)
