"""The named shapes are the published ones: facts of each model's own config.json, and its number of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmkit.model.catalog import SHAPES

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
# Qwen/Qwen3-0.6B, Qwen/Qwen3-4B, Qwen/Qwen3-30B-A3B, google/gemma-2-2b, meta-llama/Llama-3.2-1B and
# meta-llama/Llama-3.1-8B: (num_layers, hidden, inner, heads).
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, int, int, int]]] = {
    "qwen3_0_6b": (QWEN3, (28, 1024, 3072, 16)),
    "qwen3_4b": (QWEN3, (36, 2560, 9728, 32)),
    "qwen3_30b_a3b": (QWEN3_MOE, (48, 2048, 6144, 32)),
    "gemma2_2b": (GEMMA2, (26, 2304, 9216, 8)),
    "llama_1b": (LLAMA3 | {"head_dim": 64, "tie_word_embeddings": True}, (16, 2048, 8192, 32)),
    "llama_8b": (LLAMA3 | {"head_dim": 128, "tie_word_embeddings": False}, (32, 4096, 14_336, 32)),
}
NUM_PARAMETERS = {
    "qwen3_0_6b": 596_049_920,
    "qwen3_4b": 4_022_468_096,
    "qwen3_30b_a3b": 30_532_122_624,
    "gemma2_2b": 2_614_341_888,
    "llama_1b": 1_235_814_400,
    "llama_8b": 8_030_261_248,
}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE = {
    "qwen3_0_6b": {"rope_type": "default", "rope_theta": 1e6},
    "qwen3_4b": {"rope_type": "default", "rope_theta": 1e6},
    "qwen3_30b_a3b": {"rope_type": "default", "rope_theta": 1e6},
    "gemma2_2b": {"rope_type": "default", "rope_theta": 1e4},
    "llama_1b": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **LLAMA3_ROPE},
    "llama_8b": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3_ROPE},
}


def test_every_shape_is_pinned() -> None:
    assert SHAPES.keys() == PUBLISHED.keys() == NUM_PARAMETERS.keys() == ROPE.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_the_published_one(name: str) -> None:
    config = AutoConfig.for_model(**SHAPES[name])
    facts, (num_layers, hidden, inner, heads) = PUBLISHED[name]
    facts = facts | {"num_hidden_layers": num_layers, "hidden_size": hidden, "intermediate_size": inner}
    facts = facts | {"num_attention_heads": heads}
    assert {key: getattr(config, key) for key in facts} == facts
    assert dict(config.rope_parameters) == ROPE[name]
    if name.startswith("qwen3"):
        assert config.use_sliding_window is False
    assert name.startswith(("qwen3", "gemma2")) or not hasattr(config, "sliding_window")


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name]
