"""Tiny models of many architectures, with weights noisy enough that every mistake changes a token."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec

VOCAB_SIZE, WINDOW = 97, 8
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ZOO: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "model_type": "llama"},
    "llama_mha_tied": {**SHAPE, "model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama_mqa": {**SHAPE, "model_type": "llama", "num_key_value_heads": 1, "attention_bias": True},
    "llama_scaled_rope": {**SHAPE, "model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "qwen2": {**SHAPE, "model_type": "qwen2"},
    "qwen3": {**SHAPE, "model_type": "qwen3"},
    "mistral": {**SHAPE, "model_type": "mistral", "sliding_window": WINDOW},
    "gemma2": {**SHAPE, **ALTERNATING, "model_type": "gemma2", "attn_logit_softcapping": 2.0},
    "gemma3_text": {**SHAPE, **ALTERNATING, "model_type": "gemma3_text"},
    "olmo2": {**SHAPE, "model_type": "olmo2"},
    "phi": {**SHAPE, "model_type": "phi"},
    "phi3": {**SHAPE, "model_type": "phi3", "sliding_window": WINDOW},
    "phi3_partial_rotary": {**SHAPE, "model_type": "phi3", "rope_parameters": PARTIAL_ROPE},
    "gpt2": {**GPT2, "model_type": "gpt2", "pad_token_id": 0},
    "granite": {
        **SHAPE,
        "model_type": "granite",
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
    },
    "cohere2": {**SHAPE, **ALTERNATING, "model_type": "cohere2"},
    "smollm3": {**SHAPE, "model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "starcoder2": {**SHAPE, "model_type": "starcoder2", "sliding_window": WINDOW},
    "mixtral": {**SHAPE, **EXPERTS, "model_type": "mixtral", "num_local_experts": 4},
    "qwen2_moe": {
        **SHAPE,
        **EXPERTS,
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {**SHAPE, **EXPERTS, "model_type": "qwen3_moe", "num_experts": 4},
    "stablelm": {**SHAPE, "model_type": "stablelm", "use_parallel_residual": True},
    "gpt_neox": {**SHAPE, "model_type": "gpt_neox"},
    "glm4": {**SHAPE, "model_type": "glm4"},
    "exaone4": {**SHAPE, **ALTERNATING, "model_type": "exaone4"},
    "helium": {**SHAPE, "model_type": "helium"},
    "olmoe": {**SHAPE, **EXPERTS, "model_type": "olmoe", "num_experts": 4},
    "opt": {**SHAPE, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0},
    "gpt_bigcode": {**GPT2, "model_type": "gpt_bigcode"},
    "biogpt": {**SHAPE, "model_type": "biogpt"},
    "apertus": {**SHAPE, "model_type": "apertus"},
    "phimoe": {**SHAPE, **EXPERTS, "model_type": "phimoe", "num_local_experts": 4, "sliding_window": WINDOW},
}
"""Config fields by the name of the case. Phimoe tells its window only to the mask."""


SMALL: dict[str, Any] = {
    **SHAPE,
    **GPT2,
    **EXPERTS,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": SHAPE["vocab_size"],
    "global_head_dim": 8,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "dff": 48,
    "rotary_dim": 4,
    "is_decoder": True,
    "pad_token_id": 0,
}
"""What a config is asked for, if it has such a field."""
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA4 = {
    **SHAPE,
    **ALTERNATING,
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "global_head_dim": 16,
    "pad_token_id": 0,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "dbrx": {
        "attn_config": {"rope_theta": 100.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 256,
        "vocab_size": VOCAB_SIZE,
    },
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp"] * 3,
        **{f"n_{part}_layers": 2 for part in ("input", "recurrent", "output")},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {
        "text_config": {**SHAPE, "pad_token_id": 0},
        "vq_config": {"embed_dim": 8, "base_channels": 8, "channel_multiplier": [1, 1], "codebook_size": 16},
        "vocabulary_map": {"<image>": 3},
    },
    "fuyu": {"text_config": {**SHAPE, "model_type": "persimmon"}},
    "gemma3": {
        "text_config": {**ZOO["gemma3_text"]},
        "vision_config": {**IMAGES, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "gemma4": {"text_config": GEMMA4, "vision_config": None, "audio_config": None},
    "gemma4_assistant": {"text_config": {**GEMMA4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "got_ocr2": {
        "text_config": {**SHAPE, "model_type": "qwen2"},
        "vision_config": {**IMAGES, "mlp_dim": 16, "output_channels": 16, "window_size": 2, "global_attn_indexes": [0]},
    },
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "reformer": {"axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
}
"""What some configs want besides, or in another way."""
AS_IT_COMES = {"zamba2"}
"""Configs that fit together only whole."""


def every_name() -> list[str]:
    """Cases of `ZOO`, and every causal LM that transformers has, sorted."""
    return sorted({*ZOO, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})


def small_config(name: str) -> dict[str, Any]:
    """Fields for a small model of a type: `SMALL` as far as its config has them, and each kind of layer it has."""
    try:
        known = AutoConfig.for_model(name).to_dict()
    except Exception:  # not even its defaults make a config; llmkit is to say so
        known = {}
    fields = {} if name in AS_IT_COMES else {field: setting for field, setting in SMALL.items() if field in known}
    kinds = list(dict.fromkeys(known.get("layer_types") or ()))
    if fields and len(kinds) > 1:
        fields["layer_types"] = [kinds[index % len(kinds)] for index in range(SHAPE["num_hidden_layers"])]
    return {**fields, **SPECIAL.get(name, {}), "model_type": name}


@cache
def tiny_model(name: str, device: str = "cpu") -> LoadedModel:
    """The model of `ZOO[name]`, or a small one of that type, in float64; its weights are noised once and never change.

    Raises ModelError if llmkit cannot run it.
    """
    config = ZOO[name] if name in ZOO else small_config(name)
    return noised(load_model(ModelSpec(name, config=config), torch.float64, torch.device(device)))


def noised(model: LoadedModel, seed: int = 0) -> LoadedModel:
    """Matrices from N(0, 0.4), vectors moved by N(0, 0.2). Default initialisation is so tame that it hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    model.module.to(model.dtype)  # a few routers stay in float32 whatever the model's dtype
    with torch.no_grad():
        for _, parameter in sorted(model.module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
            parameter.copy_(0.4 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model
