"""Kernels in Triton's interpreter: a sample of their cases, quick enough for every run; all of them where slow."""

from __future__ import annotations

import pytest

from tests.kernels.running import INTERPRETED, run_cases

CASES = [
    "tests/attention/flash_cases.py",
    "tests/attention/flash_fp8_cases.py",
    "tests/attention/flash_shared_cases.py",
    "tests/model/layer_kernel_cases.py",
    "tests/model/tile_kernel_cases.py",
    "tests/model/expert_kernel_cases.py",
    "tests/model/device_sampler_cases.py",
]
SAMPLE = " or ".join(
    [
        "(head_dimensions and 128 and not fp8 and not shared)",
        "most_keys_first",
        "(flash_fp8_cases and cannot_hold)",
        "(flash_shared_cases and (parts or copies_of_the_first))",
        "(layer_kernel_cases and not 4168)",
        "(tile_kernel_cases and (1000 or alike or depend or width))",
        "(expert_kernel_cases and not 100-130)",
        "(device_sampler_cases and not softmax and not filters_keep)",
        "filters_keep_what_they_keep_on_the_cpu[97",
    ]
)


def test_a_sample_in_the_interpreter() -> None:
    run_cases(*CASES, select=SAMPLE, environment=INTERPRETED)


@pytest.mark.slow
def test_all_in_the_interpreter() -> None:
    run_cases(*CASES, environment=INTERPRETED)
