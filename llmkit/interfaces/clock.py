"""The only reader of time. Schedulers, caches and batching get `now` handed in and never look at a clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that never run backwards, and a way to let them pass."""

    def now(self) -> float: ...

    def sleep_until(self, when: float) -> None: ...


class MonotonicClock:
    """Real time, from zero at construction."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def sleep_until(self, when: float) -> None:
        """Sleep until `when`; returns at once if that is past."""
        delay = when - self.now()
        if delay > 0:
            time.sleep(delay)


class VirtualClock:
    """Time that moves only when told to: for simulation and tests."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep_until(self, when: float) -> None:
        self._now = max(self._now, when)

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, as a cost model does after each step."""
        self._now += seconds
