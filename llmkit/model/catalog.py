"""Models by name: the embedded one, well-known shapes with random weights, and any checkpoint. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from llmkit.hookspecs import hookimpl
from llmkit.interfaces.settings import Settings
from llmkit.model import embedded
from llmkit.model.spec import ModelSpec
from llmkit.registry import Registry


class RandomWeights(Settings):
    """Options of a model built from its config."""

    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of the random weights")
    num_layers: int = Field(0, ge=0, le=1024, description="build only this many layers; 0 means all")


class Checkpoint(Settings):
    """Options of a model read from files."""

    path: str = Field(..., min_length=1, description="folder or hub id with config.json and safetensors weights")


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_0_6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "qwen3_4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "gemma2_2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "llama_1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "llama_8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}


def _embedded(settings: Settings) -> ModelSpec:
    return ModelSpec("embedded", path=str(embedded.path()))


def _checkpoint(settings: Checkpoint) -> ModelSpec:
    return ModelSpec("hf", path=settings.path)


def _random(name: str) -> Callable[[RandomWeights], ModelSpec]:
    def build(settings: RandomWeights) -> ModelSpec:
        config = dict(SHAPES[name])
        if settings.num_layers:
            config["num_hidden_layers"] = settings.num_layers
        return ModelSpec(name, config=config, seed=settings.seed)

    return build


@hookimpl
def llmkit_register(registry: Registry) -> None:
    """Register the models of this catalogue; each factory turns settings into a `ModelSpec`."""
    registry.add("model", "embedded", _embedded, Settings, "5.6M-parameter Python code model shipped with llmkit")
    registry.add("model", "hf", _checkpoint, Checkpoint, "any local folder or hub id with safetensors weights")
    for name in SHAPES:
        registry.add("model", name, _random(name), RandomWeights, f"{name} shape with seeded random weights")
