"""Rotary embeddings that change with the longest sequence of a batch stay within the length where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkit import SamplingParams
from llmkit.llm import LLM
from llmkit.model.loading import load_model
from llmkit.model.spec import ModelSpec
from tests.equality.exact import ReallyFloat64
from tests.equality.runs import BLOCK_SIZE, Tap, error_of, fused_exactly, prompts, reference
from tests.equality.zoo import SHAPE, noised

REACH = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": REACH,
}
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {"model_type": "phi3", "original_max_position_embeddings": REACH, "rope_parameters": LONGROPE},
    "dynamic": {
        "model_type": "llama",
        "max_position_embeddings": REACH,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_equal_up_to_the_reach_and_refused_beyond(name: str) -> None:
    model = noised(load_model(ModelSpec(name, config={**SHAPE, **ROPES[name]}), torch.float64, torch.device("cpu")))
    assert model.architecture.max_model_len == REACH
    *batch, too_long = prompts((3, 9, REACH - 6, REACH))
    naive = model.as_transformers()
    limits = {"name": "continuous", "max_chunk_tokens": BLOCK_SIZE}
    with fused_exactly():
        llm = LLM(model, limits, block_size=BLOCK_SIZE, num_blocks=32)
    tap = Tap(llm)
    with ReallyFloat64():
        wanted = [reference(naive, prompt, REACH - len(prompt)) for prompt in batch]
        params = SamplingParams(max_tokens=REACH, temperature=0.0, ignore_eos=True)
        *outputs, refused = llm.generate([*batch, too_long], params)
    assert error_of(tap, outputs, wanted) < 1e-9
    assert refused.error is not None and "the model holds 32" in refused.error
