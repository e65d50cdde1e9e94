"""What a model asks of attention and cache, found before its weights load.

The model is built on the meta device and run once on two packed tokens; every attention call is recorded with the mask
that transformers would have built for it. So support does not depend on a list of names, and what does not fit the
packed paged form is refused with its reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.errors import ModelError, first_line
from llmkit.interfaces.attention import LayerSpec
from llmkit.model.lean import lean_imports
from llmkit.model.routing import PROBE, mask_of, routed

with lean_imports():
    import transformers
    from transformers import PretrainedConfig

    AutoModelForCausalLM: Any = transformers.AutoModelForCausalLM

IGNORED_OPTIONS = frozenset(
    {"attention_mask", "scaling", "sliding_window", "softcap", "dropout", "position_ids", "use_cache", "is_causal"}
    | {"output_attentions", "output_hidden_states", "output_router_logits", "cache_position", "return_dict"}
    | {"past_key_values", "cache", "position_embeddings", "training", "logits_to_keep"}
)
"""Options of an attention call that change nothing here, or that `LayerSpec` carries."""

LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
STATE = "recurrent or convolutional state that a KV cache cannot hold"
PROBED_QUERIES = (0, 1, 5, 100, 1000, 4095, 4096, 50_000, 1 << 20)
"""Positions whose visible keys are looked at."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """`layers`: qualified name of each attention module, in call order, and what it asks."""

    layers: dict[str, LayerSpec]
    vocab_size: int
    max_model_len: int
    num_parameters: int


def inspect_architecture(config: PretrainedConfig) -> Architecture:
    """Probe `config`; raises ModelError, naming the architecture and the reason, if llmkit cannot run it."""
    name, config = config.model_type, deepcopy(config)  # models note in it how they attend and choose experts
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise ModelError(f"cannot run {name} models: their config holds several text models") from error
    reason = _refuse_by_config(config, text)
    if reason:
        raise ModelError(f"cannot run {name} models: {reason}")
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=PROBE)
        except KeyError as error:
            raise ModelError(f"cannot run {name} models: their attention takes no custom function") from error
        except Exception as error:
            raise ModelError(f"cannot build this {name} config: {first_line(error)}") from error
    reason = _refuse_by_modules(model)
    if reason:
        raise ModelError(f"cannot run {name} models: {reason}")
    layers = _record_calls(model, name)
    if not layers:
        raise ModelError(f"cannot run {name} models: their attention takes no custom function")
    if len(layers) != text.num_hidden_layers:
        raise ModelError(
            f"cannot run {name} models: {len(layers)} of {text.num_hidden_layers} layers call the attention function, "
            "the others keep a state that a KV cache cannot hold"
        )
    if _forgets_more_than_it_hides(text, list(layers.values())):
        raise ModelError(f"cannot run {name} models: their cache forgets keys that their mask shows")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Architecture(layers, text.vocab_size, _max_len(text), num_parameters)


def _refuse_by_config(config: PretrainedConfig, text: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "encoder-decoder architecture"
    if getattr(text, "alibi", False):
        return "ALiBi position bias"
    others = sorted(set(getattr(text, "layer_types", None) or ()) - LAYER_TYPES)
    if others:
        return f"a KV cache of plain keys and values cannot serve layers of type {', '.join(others)}"
    if getattr(text, "num_kv_shared_layers", 0):
        return "layers share their keys and values"
    if getattr(text, "kv_lora_rank", None):
        return "latent attention (MLA) caches no plain keys and values"
    if getattr(config, "quantization_config", None):
        return "quantised weights"
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return "transformers has no causal LM class for it"
    return None


def _refuse_by_modules(model: Any) -> str | None:
    decoder = model.get_decoder() or model
    if getattr(model, "_is_stateful", False) or any(isinstance(m, torch.nn.Conv1d) for m in decoder.modules()):
        return STATE
    parameters = inspect.signature(model.forward).parameters
    for needed in ("position_ids", "logits_to_keep"):
        if needed not in parameters:
            return f"their forward takes no {needed}"
    return None


def _record_calls(model: Any, name: str) -> dict[str, LayerSpec]:
    layers: dict[str, LayerSpec] = {}

    def recorder(qualified: str, module: torch.nn.Module) -> Any:
        def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
            if qualified in layers:
                raise ModelError(f"{qualified} attends more than once")
            layers[qualified] = _layer_spec(module, query, key, value, options)
            return query.transpose(0, 1)

        return record

    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    for module in model.modules():
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            module.rope_type = "default"  # else it would compare positions, which have no values here
    modules = {module: recorder(qualified, module) for qualified, module in model.named_modules()}
    ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
    mask = torch.ones((1, 2), dtype=torch.long, device="meta")
    with routed(modules), torch.inference_mode():
        try:
            model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False, logits_to_keep=ids[0])
        except ModelError as error:
            raise ModelError(f"cannot run {name} models: {error}") from error
        except Exception as error:
            raise ModelError(f"cannot run {name} models: {_why(error)}") from error
    return layers


def _why(error: Exception) -> str:
    """What a failed probe says of the model."""
    said = first_line(error)
    if "meta" in said:
        return "their forward reads tensor values, which are unknown before weights load"
    return f"transformers says: {said}"


def _layer_spec(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> LayerSpec:
    unknown = [o for o, setting in options.items() if o not in IGNORED_OPTIONS and setting is not None]
    if unknown:
        raise ModelError(f"their attention asks for {', '.join(sorted(unknown))}")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise ModelError("attention that is not causal")
    if key.shape[-1] != value.shape[-1]:
        raise ModelError(f"keys of {key.shape[-1]} and values of {value.shape[-1]} dimensions")
    head_dim, scale = query.shape[-1], options.get("scaling")
    return LayerSpec(
        num_heads=query.shape[0],
        num_kv_heads=key.shape[0],
        head_dim=head_dim,
        scale=float(head_dim**-0.5 if scale is None else scale),
        window=_window(options.get("attention_mask"), options.get("sliding_window")),
        softcap=options.get("softcap") or None,
    )


def _window(mask: torch.Tensor | None, asked: int | None) -> int | None:
    """The window that the mask leaves visible; a kernel that needs no mask is told the same number by the model."""
    if mask is None:
        raise ModelError("they build no attention mask that says what is visible")
    window = getattr(mask, "window", None)  # layers share masks, and looking at one takes a while
    if window is None:
        window = mask.window = _visible_window(mask)  # type: ignore[attr-defined]
    is_full = window > PROBED_QUERIES[-1]
    if asked and min(asked, PROBED_QUERIES[-1] + 1) != window:
        raise ModelError(
            f"their attention asks for a window of {asked}, their mask shows {'all' if is_full else window}"
        )
    return None if is_full else int(window)


def _visible_window(mask: torch.Tensor) -> int:
    """How many keys a query far behind sees; ModelError unless every query sees its last ones and no others."""
    visible = mask_of(mask)
    if visible is None:
        raise ModelError("they build their own attention mask")
    farthest = PROBED_QUERIES[-1]
    try:
        window = int(visible(farthest, torch.arange(farthest + 2)).sum())
        for query in PROBED_QUERIES:
            keys = torch.arange(query + 2)
            if not torch.equal(visible(query, keys), (keys <= query) & (keys > query - window)):
                raise ModelError("their attention mask is neither causal nor a sliding window")
    except (IndexError, RuntimeError) as error:
        raise ModelError("their attention mask depends on more than positions") from error
    return window


def _forgets_more_than_it_hides(text: PretrainedConfig, layers: list[LayerSpec]) -> bool:
    """Whether transformers' own cache would slide where the mask does not, so that its tokens depend on chunking."""
    window = getattr(text, "sliding_window", None)
    if not window or window > PROBED_QUERIES[-1]:
        return False
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * len(layers)
    return any(kind == "sliding_attention" and not layer.window for kind, layer in zip(kinds, layers, strict=True))


def _max_len(text: PretrainedConfig) -> int:
    """Longest sequence whose tokens' positions do not depend on how long other sequences are."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        limit = getattr(text, name, None)
        if limit:
            return min([int(limit), *_rope_limits(text)])
    return 1 << 20


def _rope_limits(text: PretrainedConfig) -> Iterator[int]:
    """Longrope rotates every token by other frequencies once one token of the batch is beyond the original length."""
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            original = parameters.get("original_max_position_embeddings")
            yield int(original or text.original_max_position_embeddings)
