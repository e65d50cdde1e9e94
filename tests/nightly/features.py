"""What is special about a model's attention and layers, read off its modules and what they asked of attention."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from llmkit.interfaces.attention import LayerSpec
from llmkit.model.loading import LoadedModel

QK_NORM = re.compile(r"(q|k|query|key)_?(layer)?norm(alization)?s?")
MERGED = re.compile(r"qkv|query_key_value|c_attn|Wqkv", re.IGNORECASE)
EXPERTS = re.compile(r"experts?")
SANDWICH = re.compile(r"post_(feedforward|mlp)_(layer)?norm")


def features(model: LoadedModel) -> list[str]:
    """Short phrases, in the order in which a reader would ask."""
    specs = list(model.architecture.layers.values())
    modules = dict(model.module.named_modules())
    attention = [modules[name] for name in model.architecture.layers]
    return [*_of_attention(specs), *_of_positions(model, specs), *_of_modules(model.module, attention)]


def _of_attention(specs: list[LayerSpec]) -> Iterator[str]:
    groups = sorted({spec.num_heads // spec.num_kv_heads for spec in specs})
    if groups == [1]:
        yield "MHA"
    else:
        yield "MQA" if {spec.num_kv_heads for spec in specs} == {1} else "GQA"
    dims = sorted({spec.head_dim for spec in specs})
    if len(dims) > 1:
        yield f"heads of {' and '.join(map(str, dims))}"
    num_sliding = sum(spec.window is not None for spec in specs)
    if num_sliding:
        yield "window" if num_sliding == len(specs) else f"window in {num_sliding} of {len(specs)} layers"
    if any(spec.softcap for spec in specs):
        yield "softcap"
    if any(abs(spec.scale * spec.head_dim**0.5 - 1) > 1e-9 for spec in specs):
        yield "own scale"


def _of_positions(model: LoadedModel, specs: list[LayerSpec]) -> Iterator[str]:
    module: Any = model.module
    frequencies = [
        buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq") and "original" not in name
    ]
    if not frequencies:
        yield "no rotary"
    elif min(2 * buffer.numel() for buffer in frequencies) < min(spec.head_dim for spec in specs):
        yield "partial rotary"
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", None):
        yield f"{kind} rotary"
    if 0 in (getattr(model.config.get_text_config(), "no_rope_layers", None) or ()):
        yield "layers without rotary"


def _of_modules(module: nn.Module, attention: list[nn.Module]) -> Iterator[str]:
    parts = [(name, part) for layer in attention for name, part in layer.named_children()]
    if any(QK_NORM.fullmatch(name) for name, _ in parts):
        yield "qk-norm"
    if any(MERGED.search(name) for name, _ in parts):
        yield "merged qkv"
    if any("gate" in name for name, _ in parts):
        yield "gated output"
    if any(getattr(part, "bias", None) is not None for _, part in parts if isinstance(part, nn.Linear)):
        yield "bias"
    names = [name.rpartition(".")[2] for name, _ in module.named_modules()]
    if any(SANDWICH.fullmatch(name) for name in names):
        yield "norms on both sides"
    if any(type(part).__name__ == "LayerNorm" for part in module.modules()):
        yield "LayerNorm"
    if any(EXPERTS.fullmatch(name) for name in names):
        yield "MoE"
    if any("shared_expert" in name or name == "shared_mlp" for name in names):
        yield "shared expert"
