"""float64 without transformers' detours through float32, so that two ways to the same logits agree to 1e-9.

Many of transformers' modules (RMSNorm, rotary embedding, router softmax) round through float32 even in float64 models.
Two computations that differ by 1e-16 may then round differently and drift apart by 1e-7, which hides real mistakes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FLOAT32 = id(torch.float32)
"""Tensors among arguments would take being compared for a question about their elements."""


class ReallyFloat64(TorchFunctionMode):
    """Inside, transformers' modelling code that asks for float32 gets float64; llmkit's own gets what it asks for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _asks_for_float32(func, args, kwargs) and _caller().startswith("transformers."):
            if func is torch.Tensor.float:
                return args[0].double()
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        return func(*args, **kwargs)


def _asks_for_float32(func: Any, args: Any, kwargs: Any) -> bool:
    return func is torch.Tensor.float or FLOAT32 in map(id, args) or FLOAT32 in map(id, kwargs.values())


def _caller() -> str:
    """Module of the code outside torch that made the call."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals["__name__"].partition(".")[0] == "torch":
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else str(frame.f_globals["__name__"])
