"""What counts in a median of times on a GPU, with a clock instead of one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_time import median_ms


def test_the_first_two_runs_and_what_comes_before_each_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def work(milliseconds: float) -> None:
        now[0] += milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    times = iter([100.0, 100.0, 1.0, 5.0, 2.0])
    assert median_ms(lambda: work(next(times)), repeats=3, before=lambda: work(1000.0)) == 2.0
