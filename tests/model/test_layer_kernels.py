"""Runs `layer_kernel_cases.py` in a process of its own: Triton decides at import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).parents[2]
CAN_INTERPRET = find_spec("triton") is not None and tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)


def run_cases(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "tests/model/layer_kernel_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """Triton's interpreter breaks on numpy 2.4; without it there is nothing to run but the test below."""
    if CAN_INTERPRET:
        run_cases(TRITON_INTERPRET="1")


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    run_cases()
