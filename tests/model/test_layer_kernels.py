"""Runs the cases of layers' kernels on a GPU; without one see `tests/kernels`."""

from __future__ import annotations

import pytest

from tests.kernels.running import run_cases


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    run_cases(*(f"tests/model/{name}_kernel_cases.py" for name in ("layer", "tile", "expert")))
