"""Decoder layers of transformers through torch's compiler: one layer is compiled and serves all layers of its class.

Attention stays outside the compiled code. Only where the general network asks for it is anything of the model changed,
and only while that runs. What cannot be compiled runs as it is, and the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from llmkit.model.rehearsal import is_rehearsing
from llmkit.model.routing import IMPLEMENTATION, attend

BACKEND: str | Callable[..., Any] = "inductor"
"""As `torch.compile` takes it; inductor keeps what it has compiled on disk."""

log = logging.getLogger(__name__)


class CompiledLayers:
    """The layers of `module` that hold the attention modules of names `attentions`."""

    def __init__(self, module: torch.nn.Module, attentions: Iterable[str]) -> None:
        import torch._dynamo as dynamo  # a second of imports that others need not pay for
        from transformers import AttentionInterface

        self._failures = dynamo.exc.TorchDynamoException
        self._reason = ""
        AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]
        self._layers = _layers(module, attentions)
        kinds = dict.fromkeys(type(layer) for layer in self._layers)
        compiled = {kind: torch.compile(kind.forward, dynamic=True, backend=BACKEND) for kind in kinds}
        self._forwards = [partial(self._forward, compiled[type(layer)], layer) for layer in self._layers]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the layers' forward methods are the compiled ones."""
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            vars(layer)["forward"] = forward
        try:
            yield
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]

    def _forward(self, compiled: Callable[..., Any], layer: torch.nn.Module, *args: Any, **options: Any) -> Any:
        if not self._reason and not is_rehearsing():  # a rehearsal has function modes that guards would ask for
            try:
                return compiled(layer, *args, **options)
            except self._failures as fault:
                self._reason = " ".join(str(fault).split("\n")[:2])
                log.warning("%s runs without torch's compiler: %s", type(layer).__name__, self._reason)
        return type(layer).forward(layer, *args, **options)


def _layers(module: torch.nn.Module, attentions: Iterable[str]) -> list[torch.nn.Module]:
    """The members of module lists that hold attention, each once."""
    found: dict[torch.nn.Module, None] = {}
    for name in attentions:
        path = name.split(".")
        for depth in range(1, len(path)):
            holder = module.get_submodule(".".join(path[:depth]))
            if isinstance(holder, torch.nn.ModuleList):
                found[module.get_submodule(".".join(path[: depth + 1]))] = None
                break
    return list(found)
