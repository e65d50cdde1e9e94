"""Kernels in Triton's interpreter: a sample of their cases, quick enough for every run; all of them where slow."""

from __future__ import annotations

import pytest

from tests.kernels.running import INTERPRETED, run_cases

ATTENTION = "tests/attention/flash_cases.py"
LAYERS = "tests/model/layer_kernel_cases.py"
TILES = "tests/model/tile_kernel_cases.py"
EXPERTS = "tests/model/expert_kernel_cases.py"
SAMPLER = "tests/model/device_sampler_cases.py"
SAMPLE = " or ".join(
    [
        "(layer_kernel_cases and not 4168)",
        "(tile_kernel_cases and not 200 and not 75)",
        "(expert_kernel_cases and not 100-130)",
        "(head_dimensions and 128)",
        "(device_sampler_cases and not softmax and not filters_keep)",
        "filters_keep_what_they_keep_on_the_cpu[97",
    ]
)


def test_a_sample_in_the_interpreter() -> None:
    run_cases(ATTENTION, LAYERS, TILES, EXPERTS, SAMPLER, select=SAMPLE, environment=INTERPRETED)


@pytest.mark.slow
def test_all_in_the_interpreter() -> None:
    run_cases(ATTENTION, LAYERS, TILES, EXPERTS, SAMPLER, environment=INTERPRETED)
