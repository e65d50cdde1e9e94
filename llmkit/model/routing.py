"""The door between transformers' modelling code and an attention backend.

Transformers calls the function registered under `IMPLEMENTATION` from every attention layer; it finds the layer's
route by module. No mask function is registered under that name, so the models build no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface

IMPLEMENTATION = "llmkit"

Route = Callable[..., torch.Tensor]
"""`route(query, key, value, **options)`: query [H, N, D], key and value [Hkv, N, D] -> [N, H, Dv]."""

_routes: WeakKeyDictionary[torch.nn.Module, Route] = WeakKeyDictionary()


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: [1, H, N, D] in, [1, N, H, D] out."""
    out = _routes[module](query[0], key[0], value[0], attention_mask=attention_mask, **options)
    return out.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, _attend)


@contextmanager
def routed(modules: dict[torch.nn.Module, Route]) -> Iterator[None]:
    """Routes that hold inside a `with` block only."""
    before = {module: _routes[module] for module in modules if module in _routes}
    _routes.update(modules)
    try:
        yield
    finally:
        for module in modules:
            if module in before:
                _routes[module] = before[module]
            else:
                del _routes[module]
