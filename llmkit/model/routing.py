"""The door between transformers' modelling code and an attention backend.

Transformers calls the function registered under `IMPLEMENTATION` from every attention layer; it finds the layer's
route by module. No mask function is registered under that name, so the models build no mask. `PROBE` is the same with
a mask function that keeps what the mask would have shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from llmkit.model.lean import lean_imports

with lean_imports():
    from transformers import AttentionInterface, AttentionMaskInterface

IMPLEMENTATION = "llmkit"
PROBE = "llmkit_probe"

Route = Callable[..., torch.Tensor]
"""`route(query, key, value, **options)`: query [H, N, D], key and value [Hkv, N, D] -> [N, H, Dv]."""
Visible = Callable[[int, torch.Tensor], torch.Tensor]
"""`visible(query position, key positions [N])` -> bool [N]."""

_routes: ContextVar[Mapping[torch.nn.Module, Route]] = ContextVar("llmkit_routes")


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: [1, H, N, D] in, [1, N, H, D] out."""
    out = _routes.get()[module](query[0], key[0], value[0], attention_mask=attention_mask, **options)
    return out.unsqueeze(0), None


def describe_mask(mask_function: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
    """Called instead of building a mask: an empty tensor that remembers the rule, see `mask_of`."""
    mask = torch.empty((1, 1, options["q_length"], options["kv_length"]), device="meta")

    def visible(query: int, keys: torch.Tensor) -> torch.Tensor:
        return mask_function(torch.tensor(0), torch.tensor(0), torch.tensor(query), keys)

    mask.visible = visible  # type: ignore[attr-defined]
    return mask


def mask_of(mask: torch.Tensor) -> Visible | None:
    """The rule behind a mask made while probing; None if the model made the mask itself."""
    return getattr(mask, "visible", None)


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionInterface.register(PROBE, attend)
AttentionMaskInterface.register(PROBE, describe_mask)


@contextmanager
def routed(modules: Mapping[torch.nn.Module, Route]) -> Iterator[None]:
    """Routes that hold inside a `with` block only, and in this thread only."""
    token = _routes.set(modules)
    try:
        yield
    finally:
        _routes.reset(token)
