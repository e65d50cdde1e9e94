"""Progress: a bar where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmkit.report import progress as room
from llmkit.report.progress import Progress


def console(is_terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=is_terminal, width=100), text


def test_a_pipe_gets_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    out, text = console(is_terminal=False)
    with Progress("grid", 10, "cells", out) as progress:
        for _ in range(10):
            now[0] += 2.0
            progress.advance()
    assert text.getvalue().splitlines() == [
        "grid: 3/10 cells, 6 s",
        "grid: 6/10 cells, 12 s",
        "grid: 9/10 cells, 18 s",
        "grid: 10/10 cells, 20 s",
    ]
    assert "\x1b" not in text.getvalue()


def test_the_last_line_is_not_said_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    out, text = console(is_terminal=False)
    with Progress("grid", 2, "cells", out) as progress:
        for _ in range(2):
            now[0] += 6.0
            progress.advance()
    assert text.getvalue().splitlines() == ["grid: 1/2 cells, 6 s", "grid: 2/2 cells, 12 s"]


def test_a_terminal_gets_a_bar_that_is_drawn_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    out, text = console(is_terminal=True)
    with Progress("poisson", 1000, "tokens", out) as progress:
        sizes = set()
        for _ in range(1000):
            now[0] += 0.001
            progress.advance()
            sizes.add(len(text.getvalue()))
    assert "poisson" in text.getvalue()
    assert len(sizes) <= 3  # before, at half a second, at one second
    assert progress.done == 1000


def test_it_ends_tidily_when_the_work_fails() -> None:
    out, text = console(is_terminal=False)
    with pytest.raises(RuntimeError), Progress("batch", 5, "tokens", out) as progress:
        progress.advance(2)
        raise RuntimeError
    assert text.getvalue().startswith("batch: 2/5 tokens")
