"""The GPU workloads are the published ones: digests of all their tokens, taken from the original generator."""

from __future__ import annotations

import hashlib
import json

import pytest

from llmkit.workload.catalog import NAMED
from llmkit.workload.named import WORKLOADS


@pytest.mark.parametrize(
    ("name", "seed", "digest", "num_output_tokens"),
    [
        ("nano256", 0, "d72f19b572464c05", 133_966),
        ("nano256", 1, "b7de8efaee13e065", 156_222),
        ("single", 0, "033b7bdafe68e4fa", 256),
        ("batch64", 0, "9eba0eed614dc81d", 64 * 256),
        ("mixed512", 7, "d5809653d2213b47", 283_468),
        ("prefill", 0, "e0d20e6caa85a8ec", 32 * 8),
    ],
)
def test_token_for_token(name: str, seed: int, digest: str, num_output_tokens: int) -> None:
    requests = WORKLOADS[name](seed)
    plain = [(list(request.prompt_token_ids), request.max_tokens) for request in requests]
    assert hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16] == digest
    assert sum(request.max_tokens for request in requests) == num_output_tokens
    assert {request.arrival_time for request in requests} == {0.0}


def test_all_are_registered() -> None:
    assert WORKLOADS.keys() == NAMED.keys()
