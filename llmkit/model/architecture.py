"""What a model asks of attention and cache, found before its weights load.

The model is built on the meta device and run once on two packed tokens; every attention call is recorded. So support
does not depend on a list of names, and what does not fit the packed paged form is refused with its reason.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmkit.errors import ModelError
from llmkit.interfaces.attention import LayerSpec
from llmkit.model.routing import IMPLEMENTATION, routed

IGNORED_OPTIONS = frozenset(
    {"attention_mask", "scaling", "sliding_window", "softcap", "dropout", "position_ids", "use_cache", "is_causal"}
    | {"output_attentions", "output_hidden_states", "output_router_logits", "cache_position", "return_dict"}
    | {"past_key_values", "cache", "position_embeddings", "training"}
)
"""Options of an attention call that change nothing here, or that `LayerSpec` carries."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """`layers`: qualified name of each attention module, in call order, and what it asks."""

    layers: dict[str, LayerSpec]
    vocab_size: int
    max_model_len: int


def inspect_architecture(config: PretrainedConfig) -> Architecture:
    """Probe `config`; raises ModelError, naming the architecture and the reason, if llmkit cannot run it."""
    name = config.model_type
    reason = _refuse_by_config(config)
    if reason:
        raise ModelError(f"cannot run {name} models: {reason}")
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION)
        except KeyError as error:
            raise ModelError(f"cannot run {name} models: their attention takes no custom function") from error
        except Exception as error:
            raise ModelError(f"cannot build this {name} config: {_first_line(error)}") from error
    if getattr(model, "_is_stateful", False) or any(isinstance(m, torch.nn.Conv1d) for m in model.modules()):
        raise ModelError(f"cannot run {name} models: recurrent or convolutional state that a KV cache cannot hold")
    parameters = inspect.signature(model.forward).parameters
    for needed in ("position_ids", "logits_to_keep"):
        if needed not in parameters:
            raise ModelError(f"cannot run {name} models: their forward takes no {needed}")
    layers = _record_calls(model, name)
    num_layers = config.get_text_config().num_hidden_layers
    if len(layers) != num_layers:
        raise ModelError(
            f"cannot run {name} models: {len(layers)} of {num_layers} layers call the attention function, "
            "the others keep a state that a KV cache cannot hold"
        )
    return Architecture(layers, config.get_text_config().vocab_size, _max_len(config))


def _refuse_by_config(config: PretrainedConfig) -> str | None:
    text = config.get_text_config()
    if config.is_encoder_decoder:
        return "encoder-decoder architecture"
    if getattr(text, "attention_chunk_size", None):
        return "chunked attention masks"
    if getattr(text, "alibi", False):
        return "ALiBi position bias"
    if getattr(text, "num_kv_shared_layers", 0):
        return "layers share their keys and values"
    if getattr(text, "kv_lora_rank", None):
        return "latent attention (MLA) caches no plain keys and values"
    if getattr(text, "use_bidirectional_attention", False):
        return "bidirectional attention"
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return "transformers has no causal LM class for it"
    return None


def _record_calls(model: torch.nn.Module, name: str) -> dict[str, LayerSpec]:
    layers: dict[str, LayerSpec] = {}

    def recorder(qualified: str, module: torch.nn.Module) -> Any:
        def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
            if qualified in layers:
                raise ModelError(f"cannot run {name} models: {qualified} attends more than once")
            layers[qualified] = _layer_spec(name, module, query, key, value, options)
            return query.transpose(0, 1)

        return record

    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    modules = {module: recorder(qualified, module) for qualified, module in model.named_modules()}
    ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
    with routed(modules), torch.inference_mode():
        try:
            model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=ids[0])
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"cannot run {name} models packed: {_first_line(error)}") from error
    return layers


def _layer_spec(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: dict[str, Any],
) -> LayerSpec:
    unknown = [o for o, setting in options.items() if o not in IGNORED_OPTIONS and setting is not None]
    if unknown:
        raise ModelError(f"cannot run {name} models: their attention asks for {', '.join(sorted(unknown))}")
    if options.get("attention_mask") is not None:
        raise ModelError(f"cannot run {name} models: they build their own attention mask")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise ModelError(f"cannot run {name} models: attention that is not causal")
    if key.shape[-1] != value.shape[-1]:
        raise ModelError(f"cannot run {name} models: keys of {key.shape[-1]} and values of {value.shape[-1]} dimensions")
    head_dim = query.shape[-1]
    scale = options.get("scaling")
    window = options.get("sliding_window")
    return LayerSpec(
        num_heads=query.shape[0],
        num_kv_heads=key.shape[0],
        head_dim=head_dim,
        scale=float(head_dim**-0.5 if scale is None else scale),
        window=int(window) if window else None,
        softcap=options.get("softcap") or None,
    )


def _max_len(config: PretrainedConfig) -> int:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        limit = getattr(text, name, None)
        if limit:
            return int(limit)
    return 1 << 20


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
