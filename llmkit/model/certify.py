"""Whether the fused network of a model computes what the original modules compute. Run once, at load.

Every layer is compared in float32 on random hidden states, on what it adds to them; then the whole network, in the
model's dtype, on random tokens. Anything that does not match keeps transformers' own layers, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from llmkit.errors import first_line
from llmkit.interfaces.attention import LayerSpec
from llmkit.model.feed_forward import ExpertLayer
from llmkit.model.fused import FusedDecoder, FusedLayer
from llmkit.model.loading import LoadedModel
from llmkit.model.rehearsal import compile_ahead, rehearse
from llmkit.model.routing import Route, routed
from llmkit.model.structure import rotary_embedding, rotary_kinds, rotary_table

SIZES = (1, 24, 144)
"""Numbers of tokens that are compared: on a GPU one, some dozens and more run different kernels."""
LAYER_TOLERANCE = 1e-4
NETWORK_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}
"""Of the logits' norm. Transformers' norms round through float32 even in float64 models, so float64 agrees no better
than that. In half precision two right networks of noisy weights differ by up to 0.06 (bfloat16) or 0.008 (float16);
a factor 2 or 1.5 outside the layers makes 0.2 and more. The layers have been held to `LAYER_TOLERANCE` before."""
ROUTED_TOLERANCE = NETWORK_TOLERANCE | {torch.float16: 6e-2, torch.bfloat16: 0.45}
"""The same where routers choose: rounding sends a token to another expert now and then (0.15 in bfloat16)."""
EDGE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Embeddings into the first layer, and logits from the last layer's output: one norm and one product of rounding."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
"""Whose table does not depend on the lengths at hand; longrope's within the model's reach, see `architecture`."""
PARTS = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj or self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.gate_proj or mlp.gate_up_proj or mlp.experts",
)

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Random tokens, their positions, and their rows."""
Runs = list[Callable[[], torch.Tensor]]


def certified_decoder(model: LoadedModel, max_model_len: int) -> tuple[FusedDecoder | None, str]:
    """The fused decoder of `model` if it matches and agrees, else None and why not."""
    reason = _mismatch(model)
    if reason:
        return None, reason
    with torch.inference_mode():
        try:
            decoder = FusedDecoder(model, max_model_len)
            tokens = _tokens(model, max_model_len)
            runs = _runs(model, decoder, tokens)
            has_compiled = compile_ahead(model.device, *runs)
            reason = _certify_layers(model, max_model_len)
            has_compiled()
            if reason:
                return None, reason
            errors = _network_errors(model, decoder, tokens, runs)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as fault:
            return None, f"structure: {type(fault).__name__}: {first_line(fault)}"
    for what, error, tolerance in errors:
        if not error <= tolerance[model.dtype]:
            return None, f"{what} differ by {error:.1e} of their norm from the original modules"
    return decoder, ""


def _mismatch(model: LoadedModel) -> str:
    decoder: Any = getattr(model.module, "model", None)
    for name in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if not hasattr(decoder, name):
            return f"no model.{name}"
    modules = {name for name, _ in decoder.layers[0].named_modules()}
    for part in PARTS:
        if not modules.intersection(part.split(" or ")):
            return f"layers have no {part}"
    rope = getattr(model.config, "rope_parameters", None) or {}
    for kind in rope.values() if any(isinstance(entry, dict) for entry in rope.values()) else [rope]:
        if kind is not None and kind.get("rope_type", "default") not in ROPE_TYPES:
            return f"rotary embedding of type {kind.get('rope_type')!r}"
    return ""


def _certify_layers(model: LoadedModel, max_model_len: int) -> str:
    decoder: Any = model.module.model
    positions = _positions(max_model_len, model.device)
    hidden_size = decoder.embed_tokens.weight.shape[1]
    hidden = torch.randn(len(positions), hidden_size, generator=torch.Generator().manual_seed(0))
    # Norms hide the scale of their input unless it is near their epsilon: from 1e-3 up, both are seen.
    hidden = (hidden * torch.logspace(-3, 0, len(positions))[:, None]).to(model.device)
    kinds, rotary = rotary_kinds(decoder), decoder.rotary_emb
    for index, (layer, spec) in enumerate(zip(decoder.layers, model.architecture.layers.values(), strict=True)):
        single = deepcopy(layer).float()
        embedding = rotary_embedding(rotary, hidden, positions, kinds[index])
        table = rotary_table(rotary, positions, hidden, kinds[index])
        with routed({single.self_attn: _dense_route(spec)}):
            out = single(hidden.unsqueeze(0), position_ids=positions.unsqueeze(0), position_embeddings=embedding)
        original = (out[0] if isinstance(out, tuple) else out).view_as(hidden) - hidden
        copy = FusedLayer(single, spec)
        runs = [partial(copy, hidden[:num], table[0][:num], table[1][:num], _Dense(spec)) for num in SIZES]
        if not index:
            rehearse(model.device, *runs)
        for num, run in zip(SIZES, runs, strict=True):  # the first tokens see themselves only
            error = _distance(run() - hidden[:num], original[:num])
            if not error <= LAYER_TOLERANCE:
                return f"layer {index} differs by {error:.1e} of its update from the original"
    return ""


def _network_errors(
    model: LoadedModel, decoder: FusedDecoder, tokens: Tokens, runs: Runs
) -> list[tuple[str, float, dict[torch.dtype, float]]]:
    """What was compared on random tokens, its relative distance from the original, and how much is allowed."""
    ids, positions, rows = tokens
    modules = dict(model.module.named_modules())
    inner: Any = model.module.model
    seen: list[torch.Tensor] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for m in (inner.layers[0], inner.norm)
    ]
    try:
        with routed({modules[name]: _dense_route(spec) for name, spec in model.architecture.layers.items()}):
            out = model.module(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows)
    finally:
        for hook in hooks:
            hook.remove()
    is_routed = any(isinstance(layer.feed_forward, ExpertLayer) for layer in decoder.layers)
    tolerance = ROUTED_TOLERANCE if is_routed else NETWORK_TOLERANCE
    return [
        ("embeddings", _distance(decoder.embed(ids), seen[0]), EDGE_TOLERANCE),
        ("logits of the last layer's output", _distance(decoder.logits(seen[1]), out.logits[0]), EDGE_TOLERANCE),
        *(("logits", _distance(run(), out.logits[0, :num]), tolerance) for run, num in zip(runs, SIZES, strict=True)),
    ]


def _runs(model: LoadedModel, decoder: FusedDecoder, tokens: Tokens) -> Runs:
    """The network on `SIZES` of the same tokens."""
    ids, positions, rows = tokens
    attentions = [_Dense(spec) for spec in model.architecture.layers.values()]
    return [partial(decoder.forward, ids[:num], positions[:num], rows[:num], attentions) for num in SIZES]


def _tokens(model: LoadedModel, max_model_len: int) -> Tokens:
    positions = _positions(max_model_len, model.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.architecture.vocab_size, positions.shape, generator=generator)
    return ids.to(model.device), positions, torch.arange(len(ids), device=model.device)


def _distance(fused: torch.Tensor, original: torch.Tensor) -> float:
    return float((fused.double() - original.double()).norm() / original.double().norm())


def _positions(max_model_len: int, device: torch.device) -> torch.Tensor:
    """Increasing positions spread over the whole range."""
    num = min(SIZES[-1], max_model_len)
    return torch.arange(num, device=device) * (max_model_len // num)


def _dense_route(spec: LayerSpec) -> Route:
    def route(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> torch.Tensor:
        return _Dense(spec)(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))

    return route


@dataclass(frozen=True, slots=True)
class _Dense:
    """Causal attention among the tokens themselves; the same for both sides, so window and softcap do not matter."""

    spec: LayerSpec

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        groups = self.spec.num_heads // self.spec.num_kv_heads
        key, value = (t.repeat_interleave(groups, dim=1).transpose(0, 1) for t in (key, value))
        out = F.scaled_dot_product_attention(query.transpose(0, 1), key, value, is_causal=True, scale=self.spec.scale)
        return out.transpose(0, 1).contiguous()

    def slots(self) -> None:
        return None

    def over_slots(self, query: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError
