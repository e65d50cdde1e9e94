"""A model from its checkpoint, which transformers loads on a way of its own: the tokens of the same model in memory."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit import LLM, ModelError, SamplingParams
from llmkit.model.loading import load_model
from llmkit.model.spec import ModelSpec
from tests.equality.zoo import tiny_model

FAST = ("gemma3_text", "llama", "mixtral")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16]]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TAKEN = re.findall(r"^\| (\S+) \|.*\| (?:fused|transformers') \|", PAGE.read_text("utf-8"), re.MULTILINE)
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in TAKEN]


def tokens_of(model: Any, fused: bool) -> list[tuple[int, ...]]:
    outputs = LLM(model, fused=fused, block_size=4, num_blocks=64).generate(PROMPTS, GREEDY)
    assert not [output.error for output in outputs if output.error]
    return [output.token_ids for output in outputs]


def test_most_architectures_are_tried() -> None:
    assert len(TAKEN) > 80 and {*FAST} < {*TAKEN}


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    module = model.as_transformers()
    # What llmkit takes away, and some configs want back.
    object.__setattr__(module.config, "pad_token_id", 0)
    module.generation_config.pad_token_id = None
    module.save_pretrained(tmp_path)
    load = partial(load_model, ModelSpec("hf", path=str(tmp_path)), device=torch.device("cpu"))
    if module.config.model_type != model.config.model_type:  # emu3 saves no more than its text model's config
        with pytest.raises(ModelError, match="transformers has no causal LM class for it"):
            load(torch.float64)
        return
    saved = load(torch.float64)
    for fused in (True, False):
        assert tokens_of(saved, fused) == tokens_of(model, fused)
    for dtype in (torch.float32, torch.bfloat16):
        assert [len(token_ids) for token_ids in tokens_of(load(dtype), fused=False)] == [6, 6]
