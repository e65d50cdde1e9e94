"""One packed forward pass: token ids and positions in, logits of the chosen rows out."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Protocol

import torch

from llmkit.interfaces.attention import AttentionBackend, KeyValueSlots
from llmkit.model.certify import certified_decoder
from llmkit.model.compiled import CompiledLayers
from llmkit.model.fused import FusedDecoder
from llmkit.model.loading import LoadedModel
from llmkit.model.routing import Route, routed

log = logging.getLogger(__name__)


class Network(Protocol):
    """N packed tokens of any mix of sequences; the attention backend knows which is whose."""

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`input_ids`, `positions` int64 [N]; `rows` int64 [R] chooses tokens. Returns logits [R, vocab_size]."""
        ...


class GeneralNetwork:
    """Any supported model through transformers' own modules; only their attention is ours.

    With `compiles` their layers go through torch's compiler.
    """

    def __init__(self, model: LoadedModel, backend: AttentionBackend, compiles: bool = False) -> None:
        self._module = model.module
        self._compiled = CompiledLayers(model.module, model.architecture.layers) if compiles else None
        modules = dict(model.module.named_modules())
        self._routes = {modules[name]: _route(backend, i) for i, name in enumerate(model.architecture.layers)}

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with routed(self._routes), self._compiled.in_place() if self._compiled else nullcontext():
            out = self._module(
                input_ids=input_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows
            )
        logits: torch.Tensor = out.logits[0]
        return logits


def _route(backend: AttentionBackend, layer: int) -> Route:
    def route(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> torch.Tensor:
        return backend.forward(layer, query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))

    return route


class LayerAttention:
    """One layer of an attention backend."""

    def __init__(self, backend: AttentionBackend, layer: int) -> None:
        self._backend = backend
        self._layer = layer

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self._backend.forward(self._layer, query, key, value)

    def slots(self) -> KeyValueSlots | None:
        return self._backend.slots(self._layer)

    def over_slots(self, query: torch.Tensor) -> torch.Tensor:
        return self._backend.attend(self._layer, query)


class FusedNetwork:
    """A Llama-shaped model through fused layers."""

    def __init__(self, decoder: FusedDecoder, backend: AttentionBackend) -> None:
        self._decoder = decoder
        self._attentions = [LayerAttention(backend, index) for index in range(len(decoder.layers))]

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self._decoder.forward(input_ids, positions, rows, self._attentions)


def build_network(
    model: LoadedModel, backend: AttentionBackend, max_model_len: int, fused: bool = True, compiles: bool = False
) -> Network:
    """The fused network where the model's structure matches and its numbers agree, the general one otherwise.

    `compiles` is for the general one: whether its layers go through torch's compiler.
    """
    if not fused:
        return GeneralNetwork(model, backend, compiles)
    if max_model_len not in model.fused:
        model.fused[max_model_len] = certified_decoder(model, max_model_len)
    decoder, reason = model.fused[max_model_len]
    if decoder is None:
        log.info("model %s runs transformers' own layers: %s", model.name, reason)
        return GeneralNetwork(model, backend, compiles)
    return FusedNetwork(decoder, backend)
