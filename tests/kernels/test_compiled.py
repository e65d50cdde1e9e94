"""The kernels fit an H200: compiled here, without a GPU; see `compile_cases.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.running import run_cases

CASES = "tests/kernels/compile_cases.py"
PREFILL_CASES = "tests/kernels/prefill_compile_cases.py"


def test_kernels_compiled_for_sm_90(tmp_path: Path) -> None:
    select = "qwen3_0_6b or every_kernel or step"
    run_cases(CASES, select=select, environment={"TRITON_CACHE_DIR": str(tmp_path)})


def test_kernels_for_prompts_compiled_for_sm_90(tmp_path: Path) -> None:
    run_cases(PREFILL_CASES, environment={"TRITON_CACHE_DIR": str(tmp_path)})


@pytest.mark.slow
def test_kernels_of_all_shapes_compiled_for_sm_90(tmp_path: Path) -> None:
    run_cases(CASES, environment={"TRITON_CACHE_DIR": str(tmp_path)})
