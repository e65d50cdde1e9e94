"""Every causal LM that transformers knows is either refused by name or equal to `transformers.generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmkit import ModelError
from llmkit.llm import LLM
from llmkit.model.loading import load_model
from llmkit.model.spec import ModelSpec
from tests.equality.exact import ReallyFloat64
from tests.equality.runs import BLOCK_SIZE, GREEDY, ROOMY, Tap, error_of, prompts, reference
from tests.equality.zoo import EXPERTS, GPT2, SHAPE, WINDOW, ZOO, noised

SMALL: dict[str, Any] = {
    **SHAPE,
    **GPT2,
    **EXPERTS,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": SHAPE["vocab_size"],
    "global_head_dim": 8,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "dff": 48,
    "pad_token_id": 0,
}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WITH_IMAGES: dict[str, dict[str, Any]] = {
    "fuyu": {"text_config": {**SHAPE, "model_type": "persimmon"}},
    "gemma3": {
        "text_config": {**ZOO["gemma3_text"]},
        "vision_config": {**IMAGES, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
}
TOO_LARGE = {"emu3", "gemma4"}
"""Even the smallest vision towers of these take gigabytes."""


def small(name: str) -> dict[str, Any]:
    """Those fields of `SMALL` that the config of `name` has; none if not even its defaults make a config."""
    try:
        known = AutoConfig.for_model(name).to_dict()
    except Exception:
        return {}
    return {field: setting for field, setting in SMALL.items() if field in known}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - TOO_LARGE))
def test_equal_or_refused(name: str) -> None:
    spec = ModelSpec(name, config={**small(name), **WITH_IMAGES.get(name, {}), "model_type": name})
    try:
        model = noised(load_model(spec, torch.float64, torch.device("cpu")))
    except ModelError as refusal:
        assert "\n" not in str(refusal)
        return
    naive = model.as_transformers()
    with ReallyFloat64():
        wanted = [reference(naive, prompt) for prompt in prompts()]
        scheduler = {"name": "continuous", "max_chunk_tokens": BLOCK_SIZE + 1}
        llm = LLM(model, scheduler, block_size=BLOCK_SIZE, num_blocks=ROOMY, fused=False)
        tap = Tap(llm)
        outputs = llm.generate(prompts(), GREEDY)
    assert error_of(tap, outputs, wanted) < 1e-9
