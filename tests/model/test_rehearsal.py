"""The processes in which kernels compile, and launches beside a rehearsal; the kernels are in `tests/kernels`."""

from __future__ import annotations

import multiprocessing
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from llmkit.model import rehearsal

HANGING = """
import os, signal, time
from llmkit.model import rehearsal
os.cpu_count = lambda: 2
rehearsal.PATIENCE = {patience}
signal.signal(signal.SIGTERM, lambda *_: None)
reader, writer = os.pipe()
def hang():
    os.write(writer, b".")
    time.sleep(60)
rehearsal._side_by_side([hang, hang])
os.read(reader, 1), os.read(reader, 1)
{end}
"""


@pytest.mark.parametrize(
    ("patience", "end"), [(60, ""), (2, "os.kill(os.getpid(), signal.SIGKILL)")], ids=["exits", "is killed"]
)
def test_processes_that_hang_end_where_their_parent(patience: int, end: str) -> None:
    """Neither it nor who reads its output waits for them; they all hold `alive`."""
    gone, alive = os.pipe()
    command = [sys.executable, "-c", HANGING.format(patience=patience, end=end)]
    subprocess.run(command, capture_output=True, pass_fds=[alive], timeout=30)
    os.close(alive)
    assert select.select([gone], [], [], 30)[0] and os.read(gone, 1) == b""
    os.close(gone)


def test_who_is_given_up_is_no_zombie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "PATIENCE", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before = multiprocessing.active_children()
    wait = rehearsal._side_by_side([lambda: time.sleep(60)] * 2)
    started = [process for process in multiprocessing.active_children() if process not in before]
    wait()
    assert len(started) == 2 and not any(Path(f"/proc/{process.pid}").exists() for process in started)


def test_where_no_process_may_be_started_the_step_compiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a process that is a daemon itself."""
    config: Any = multiprocessing.current_process()
    monkeypatch.setitem(config._config, "daemon", True)
    monkeypatch.setattr(rehearsal, "_kernels_of", lambda steps: [str, str])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    rehearsal.rehearse(torch.device("cuda"))
    assert "kernels compile one by one: daemonic processes are not allowed to have children" in caplog.text


def test_what_another_thread_launches_meanwhile_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *, grid, warmup: seen.append(warmup))

    def launch() -> None:
        JITFunction.run(None, grid=(1,), warmup=False)

    def step() -> None:
        launch()
        other = Thread(target=launch)
        other.start()
        other.join()

    assert rehearsal._kernels_of([step]) == [] and seen == [True, False]
