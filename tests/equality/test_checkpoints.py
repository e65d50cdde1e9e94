"""A model from its checkpoint, which transformers loads on a way of its own: the tokens of the same model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit import LLM, ModelError, SamplingParams
from llmkit.model.loading import load_model
from llmkit.model.spec import ModelSpec
from tests.equality.zoo import every_name, tiny_model

FAST = ("gemma3_text", "llama", "mixtral")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16]]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in every_name()]


def tokens_of(model: Any, fused: bool) -> list[tuple[int, ...]]:
    outputs = LLM(model, fused=fused, block_size=4, num_blocks=64).generate(PROMPTS, GREEDY)
    assert not [output.error for output in outputs if output.error]
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    try:
        model = tiny_model(name)
    except ModelError as refusal:
        pytest.skip(str(refusal))
    module = model.as_transformers()
    if module.config.model_type != model.config.model_type:
        pytest.skip(f"saved as {module.config.model_type}, which is no causal LM by itself")
    # What llmkit takes away, and some configs want back.
    object.__setattr__(module.config, "pad_token_id", 0)
    module.generation_config.pad_token_id = None
    module.save_pretrained(tmp_path)
    for fused in (True, False):
        saved = load_model(ModelSpec("hf", path=str(tmp_path)), torch.float64, torch.device("cpu"))
        assert tokens_of(saved, fused) == tokens_of(model, fused)
    for dtype in (torch.float32, torch.bfloat16):
        saved = load_model(ModelSpec("hf", path=str(tmp_path)), dtype, torch.device("cpu"))
        assert [len(token_ids) for token_ids in tokens_of(saved, fused=False)] == [6, 6]
