"""Fused layers for Llama-shaped decoders: fewer, larger operations, equal numbers.

Merged q/k/v and gate/up projections, one-call RMSNorm, rotary embedding from a table. Norms behind attention and
feed-forward, norms of queries and keys, biases, partial rotary embedding, experts: what the modules have. A model
matches by the structure of its modules, not by its name, and `llmkit.model.certify` compares it with the original at
load. Merged weights replace the originals' storage (views): nothing is held twice, the transformers model stays usable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from llmkit.interfaces.attention import KeyValueSlots, LayerSpec
from llmkit.model.feed_forward import feed_forward, is_silu, takes_kernels
from llmkit.model.linear import linear, merge
from llmkit.model.loading import LoadedModel
from llmkit.model.structure import Norm, norm_of, rms, rotary_kinds, rotary_table, rotate


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
    """One pre-norm decoder layer: RMSNorm, attention with rotary embedding, RMSNorm, feed-forward.

    `after_attention` and `after_feed_forward` are norms of what is added to the hidden states, None for none;
    `is_plain` without them and with a SiLU gate, as in a Llama. `next_norm`, if known, is that of the layer behind.
    """

    def __init__(self, layer: Any, spec: LayerSpec) -> None:
        attention, has_four_norms = layer.self_attn, hasattr(layer, "pre_feedforward_layernorm")
        self.spec = spec
        self.input_norm = norm_of(layer.input_layernorm)
        self.post_norm = norm_of(layer.pre_feedforward_layernorm if has_four_norms else layer.post_attention_layernorm)
        self.after_attention = norm_of(layer.post_attention_layernorm) if has_four_norms else None
        self.after_feed_forward = norm_of(layer.post_feedforward_layernorm) if has_four_norms else None
        self.q_norm = norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None
        merged = getattr(attention, "qkv_proj", None)
        separate = [] if merged is not None else [attention.q_proj, attention.k_proj, attention.v_proj]
        self.weights = {
            "qkv": merge(separate) if merged is None else (merged.weight, merged.bias),
            "out": (attention.o_proj.weight, attention.o_proj.bias),
        }
        self.qkv, self.out = (linear(*pair) for pair in self.weights.values())
        self.feed_forward = feed_forward(layer.mlp)
        self.next_norm: Norm | None = None
        self.is_plain = is_silu(self.feed_forward) and self.after_attention is self.after_feed_forward is None
        self._kernels = layer_kernels(self)

    def __call__(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attention) -> torch.Tensor:
        """`hidden` [N, hidden_size]; `cos`, `sin` of its tokens as of `rotary_table`, [N, 1, rotary_dim]."""
        return total(*self.extend(hidden, None, cos, sin, attend))

    def extend(
        self, hidden: torch.Tensor, ahead: Any, cos: torch.Tensor, sin: torch.Tensor, attend: Attention
    ) -> tuple[torch.Tensor, Any]:
        """The layer on `hidden` and what the layer before left to it, `ahead`; returns both of its own.

        `ahead` is a tensor that is still to be added, None, or what only kernels understand; see `total`.
        """
        spec = self.spec
        num_rotated = spec.num_heads + spec.num_kv_heads
        if self._kernels is not None:
            parts: tuple[torch.Tensor, Any] = self._kernels.run(self, hidden, ahead, cos, sin, attend)
            return parts
        hidden = total(hidden, ahead)
        qkv = self.qkv(rms(hidden, self.input_norm))
        heads = qkv.view(hidden.shape[0], num_rotated + spec.num_kv_heads, spec.head_dim)
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if self.q_norm is not None and self.k_norm is not None:
            query = rms(rotated[:, : spec.num_heads], self.q_norm)
            rotated = torch.cat([query, rms(rotated[:, spec.num_heads :], self.k_norm)], dim=1)
        rotated = rotate(rotated, cos, sin)
        context = attend(rotated[:, : spec.num_heads], rotated[:, spec.num_heads :], value)
        update = self.out(context.view(hidden.shape[0], -1))
        hidden = hidden + (update if self.after_attention is None else rms(update, self.after_attention))
        update = self.feed_forward(rms(hidden, self.post_norm))
        return hidden, update if self.after_feed_forward is None else rms(update, self.after_feed_forward)


def total(hidden: torch.Tensor, ahead: Any, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """The hidden states of `rows` behind a layer that returned `hidden` and `ahead`."""
    return hidden[rows] + ahead[rows] if isinstance(ahead, torch.Tensor) else hidden[rows]


def layer_kernels(layer: FusedLayer) -> Any:
    """The module of Triton kernels between the products of `layer` on an NVIDIA GPU; None where torch runs them."""
    q_norm, k_norm = layer.q_norm, layer.k_norm
    is_alike = q_norm is k_norm is None or (q_norm is not None and k_norm is not None and q_norm[1] == k_norm[1])
    if not takes_kernels(layer.weights["out"][0]) or not is_alike:
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
        self._norm = norm_of(decoder.norm)
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        positions, self._kinds = torch.arange(max_model_len, device=model.device), rotary_kinds(decoder)
        self._tables = {
            kind: rotary_table(decoder.rotary_emb, positions, self._embed.weight, kind)
            for kind in dict.fromkeys(self._kinds)
        }
        self.layers = [FusedLayer(layer, spec) for layer, spec in zip(decoder.layers, specs, strict=True)]
        norms = [layer.input_norm for layer in self.layers] + [self._norm]
        for layer, norm in zip(self.layers, norms[1:], strict=True):
            layer.next_norm = norm

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, attentions: Sequence[Attention]
    ) -> torch.Tensor:
        """Arguments and result as in `Network`; `attentions` by layer."""
        hidden = self.embed(input_ids)
        tables = {kind: (cos[positions], sin[positions]) for kind, (cos, sin) in self._tables.items()}
        ahead: Any = None
        for layer, kind, attend in zip(self.layers, self._kinds, attentions, strict=True):
            hidden, ahead = layer.extend(hidden, ahead, *tables[kind], attend)
        return self.logits(total(hidden, ahead, rows))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the first layer reads, [N, hidden_size]."""
        embedded: torch.Tensor = self._embed(input_ids)
        return embedded

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab_size] of what the last layer wrote, [R, hidden_size]."""
        logits = self._head(rms(hidden, self._norm))
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap
