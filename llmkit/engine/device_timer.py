"""How long the device worked, by events in its own queue; nobody ever waits for them. Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class DeviceTimer:
    """Puts an event before and behind what is enqueued, and adds up the time between those that have passed.

    Work that waits in the queue has not begun. Gaps in which the device waits for the host inside a pair count as work.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        """`make_event` makes what `torch.cuda.Event(enable_timing=True)` is."""
        self._make_event = make_event
        self._spare: list[tuple[Any, Any]] = []
        self._running: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Time what is enqueued inside."""
        begin, end = self._spare.pop() if self._spare else (self._make_event(), self._make_event())
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._running.append((begin, end))

    def take(self) -> float:
        """Seconds of work that has ended since the last call."""
        milliseconds = 0.0
        while self._running and self._running[0][1].query():
            begin, end = self._running.popleft()
            milliseconds += begin.elapsed_time(end)
            self._spare.append((begin, end))
        return milliseconds / 1e3
