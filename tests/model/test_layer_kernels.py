"""Runs `layer_kernel_cases.py` and `expert_kernel_cases.py` on a GPU; without one see `tests/kernels`."""

from __future__ import annotations

import pytest

from tests.kernels.running import run_cases


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    run_cases("tests/model/layer_kernel_cases.py", "tests/model/expert_kernel_cases.py")
