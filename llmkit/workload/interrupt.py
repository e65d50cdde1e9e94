"""Ctrl-C between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """`is_requested` turns true at the first Ctrl-C; the second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.is_requested = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Notes Ctrl-C while the body runs. Outside the main thread, where signals never arrive, it does nothing."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
