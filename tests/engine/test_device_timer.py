"""Time on the device: pairs of events that have passed, each counted once, and nobody waits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llmkit.engine.device_timer import DeviceTimer


class Queue:
    """A device that gets to event n at `times[n]` milliseconds, and has got as far as `num_passed` events."""

    def __init__(self, times: Sequence[float]) -> None:
        self.times, self.num_passed, self.num_recorded, self.num_made = times, 0, 0, 0

    def make_event(self) -> Event:
        self.num_made += 1
        return Event(self)


class Event:
    def __init__(self, queue: Queue) -> None:
        self.queue, self.number = queue, -1

    def record(self) -> None:
        self.number = self.queue.num_recorded
        self.queue.num_recorded += 1

    def query(self) -> bool:
        return self.number < self.queue.num_passed

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query()
        return self.queue.times[end.number] - self.queue.times[self.number]


def test_work_counts_once_it_has_ended_and_then_once() -> None:
    queue = Queue([0.0, 3.0, 3.0, 5.0, 9.0, 10.0])
    timer = DeviceTimer(queue.make_event)
    for _ in range(2):
        with timer.timing():
            pass
    assert timer.take() == 0.0
    queue.num_passed = 3  # the first step has ended, the second has begun
    assert timer.take() == pytest.approx(0.003)
    assert timer.take() == 0.0
    with timer.timing():
        pass
    queue.num_passed = 6
    assert timer.take() == pytest.approx(0.002 + 0.001), "idle between steps is not work"
    assert queue.num_made == 4, "events are used again"


def test_a_launch_that_fails_is_timed_to_its_end() -> None:
    queue = Queue([1.0, 2.5])
    timer = DeviceTimer(queue.make_event)
    with pytest.raises(ValueError), timer.timing():
        raise ValueError
    queue.num_passed = 2
    assert timer.take() == pytest.approx(0.0015)
