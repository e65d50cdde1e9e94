"""Progress of long work on stderr: a live bar on a terminal, a plain line now and then in a pipe."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

BAR_SECONDS = 0.5
LINE_SECONDS = 5.0


class Progress:
    """Counts towards `total`. Draws at most twice a second (a line every 5 s in a pipe), so it hardly disturbs timing.

    Use it as a context manager: `with Progress("poisson", 64, "requests") as progress: progress.advance()`.
    """

    def __init__(self, title: str, total: int, unit: str, console: Console | None = None) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self._told = -1
        self._console = console or Console(stderr=True)
        self._bar: Bar | None = None
        self._started = self._drawn = time.monotonic()
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                auto_refresh=False,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count
        now = time.monotonic()
        if now - self._drawn < (BAR_SECONDS if self._bar is not None else LINE_SECONDS):
            return
        self._drawn = now
        self._draw()

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, refresh=True)
            return
        self._told = self.done
        elapsed = time.monotonic() - self._started
        self._console.print(f"{self.title}: {self.done}/{self.total} {self.unit}, {elapsed:.0f} s", highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._told != self.done:
            self._draw()
