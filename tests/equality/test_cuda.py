"""The same equality on a GPU, where the next step is planned while one runs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.equality.arrangements import UNLIMITED, run
from tests.equality.covering import pairwise
from tests.equality.runs import BLOCK_SIZE, installed
from tests.equality.test_matrix import case_id
from tests.equality.zoo import ZOO

FACTORS: dict[str, list[Any]] = {
    "model": list(ZOO),
    "scheduler": installed().names("scheduler"),
    "cache": installed().names("cache"),
    "attention": ["sdpa"],
    "chunk": [1, BLOCK_SIZE - 1, BLOCK_SIZE + 1, UNLIMITED],
    "budget": [BLOCK_SIZE, 2048],
    "preemption": ["none", "scarce", "forced"],
    "depth": [0, 1],
    "fused": [False, True],
}


@pytest.mark.cuda
@pytest.mark.parametrize("case", pairwise(FACTORS), ids=case_id)
def test_equal_to_transformers_on_a_gpu(case: dict[str, Any]) -> None:
    run(**case, device="cuda")
