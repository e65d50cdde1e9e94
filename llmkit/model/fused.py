"""Fused layers for Llama-shaped decoders: fewer, larger operations, equal numbers.

Merged q/k/v and gate/up projections, one-call RMSNorm, rotary embedding from a table. A model matches by the structure
of its modules, not by its name, and `llmkit.model.certify` compares it with the original at load. The merged weights
replace the originals' storage (views), so nothing is held twice and the transformers model stays usable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from llmkit.interfaces.attention import KeyValueSlots, LayerSpec
from llmkit.model.linear import linear, merge
from llmkit.model.loading import LoadedModel


class Attention(Protocol):
    """Attention of one layer over a planned step."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As `AttentionBackend.forward`."""
        ...

    def slots(self) -> KeyValueSlots | None:
        """As `AttentionBackend.slots`."""
        ...

    def over_slots(self, query: torch.Tensor) -> torch.Tensor:
        """As `AttentionBackend.attend`, after the slots were filled."""
        ...


class FusedLayer:
    """One pre-norm decoder layer: RMSNorm, attention with rotary embedding, RMSNorm, gated MLP."""

    def __init__(self, layer: Any, spec: LayerSpec) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.spec = spec
        self.input_norm = _norm(layer.input_layernorm)
        self.post_norm = _norm(layer.post_attention_layernorm)
        self.q_norm = _norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = _norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.weights = {
            "qkv": merge([attention.q_proj, attention.k_proj, attention.v_proj]),
            "out": (attention.o_proj.weight, attention.o_proj.bias),
            "gate_up": merge([mlp.gate_proj, mlp.up_proj]),
            "down": (mlp.down_proj.weight, mlp.down_proj.bias),
        }
        self.qkv, self.out, self.gate_up, self.down = (linear(*pair) for pair in self.weights.values())
        self.activation = mlp.act_fn
        self._kernels = layer_kernels(self)

    def __call__(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attention) -> torch.Tensor:
        """`hidden` [N, hidden_size]; `cos`, `sin` [N, 1, head_dim] with the sign of the rotation folded into `sin`."""
        return total(*self.extend(hidden, None, cos, sin, attend))

    def extend(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, attend: Attention
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer on `hidden` + `delta`; returns two parts as well, whose sum the next layer takes with its norm."""
        spec = self.spec
        num_rotated = spec.num_heads + spec.num_kv_heads
        if self._kernels is not None:
            parts: tuple[torch.Tensor, torch.Tensor | None] = self._kernels.run(self, hidden, delta, cos, sin, attend)
            return parts
        hidden = total(hidden, delta)
        qkv = self.qkv(_rms(hidden, self.input_norm))
        heads = qkv.view(hidden.shape[0], num_rotated + spec.num_kv_heads, spec.head_dim)
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if self.q_norm is not None and self.k_norm is not None:
            query = _rms(rotated[:, : spec.num_heads], self.q_norm)
            rotated = torch.cat([query, _rms(rotated[:, spec.num_heads :], self.k_norm)], dim=1)
        rotated = torch.addcmul(rotated * cos, rotated.roll(spec.head_dim // 2, -1), sin)
        context = attend(rotated[:, : spec.num_heads], rotated[:, spec.num_heads :], value)
        hidden = hidden + self.out(context.view(hidden.shape[0], -1))
        gate, up = self.gate_up(_rms(hidden, self.post_norm)).chunk(2, dim=-1)
        return hidden, self.down(self.activation(gate) * up)


def total(hidden: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
    """The sum of what a layer returns in two parts."""
    return hidden if delta is None else hidden + delta


def layer_kernels(layer: FusedLayer) -> Any:
    """The module of Triton kernels between the products of `layer` on an NVIDIA GPU; None where torch runs them."""
    is_silu = type(layer.activation).__name__ in ("SiLU", "SiLUActivation")
    weight, q_norm, k_norm = layer.input_norm[0], layer.q_norm, layer.k_norm
    is_alike = q_norm is k_norm is None or (q_norm is not None and k_norm is not None and q_norm[1] == k_norm[1])
    if weight.device.type != "cuda" or weight.dtype is torch.float64 or not is_silu or not is_alike:
        return None
    from llmkit.model import layer_kernels as kernels

    return kernels


class FusedDecoder:
    """A whole causal LM of fused layers."""

    def __init__(self, model: LoadedModel, max_model_len: int) -> None:
        decoder: Any = model.module.model
        specs = list(model.architecture.layers.values())
        self._embed = decoder.embed_tokens
        head: Any = model.module.lm_head
        self._head = linear(head.weight, head.bias)
        self._norm = _norm(decoder.norm)
        positions = torch.arange(max_model_len, device=model.device)
        self._cos, self._sin = rotary_table(decoder.rotary_emb, positions, self._embed.weight)
        self.layers = [FusedLayer(layer, spec) for layer, spec in zip(decoder.layers, specs, strict=True)]

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, attentions: Sequence[Attention]
    ) -> torch.Tensor:
        """Arguments and result as in `Network`; `attentions` by layer."""
        hidden = self.embed(input_ids)
        cos, sin = self._cos[positions], self._sin[positions]
        delta: torch.Tensor | None = None
        for layer, attend in zip(self.layers, attentions, strict=True):
            hidden, delta = layer.extend(hidden, delta, cos, sin, attend)
        return self.logits(total(hidden[rows], None if delta is None else delta[rows]))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the first layer reads, [N, hidden_size]."""
        return F.embedding(input_ids, self._embed.weight)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab_size] of what the last layer wrote, [R, hidden_size]."""
        return self._head(_rms(hidden, self._norm))


def rotary_table(rotary: Any, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sign-folded sines [N, 1, head_dim] of `positions` [N], in the dtype of `like`."""
    cos, sin = rotary(like[:1].unsqueeze(0), positions.unsqueeze(0))
    half = cos.shape[-1] // 2
    signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
    return cos[0].unsqueeze(1).contiguous(), signed.unsqueeze(1).contiguous()


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    return module.weight, float(module.variance_epsilon)


def _rms(x: torch.Tensor, norm: tuple[torch.Tensor, float]) -> torch.Tensor:
    return F.rms_norm(x, norm[0].shape, norm[0], norm[1])
