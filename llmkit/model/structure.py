"""What the modules of a decoder layer are, told by their structure and by what they compute, not by their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Norm = tuple[Tensor, float]
"""RMSNorm's gain and epsilon. A gain wider than what it scales says that the product is rounded once, behind it."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""Activations of gated layers that the Triton kernels know."""


def norm_of(module: Any) -> Norm:
    """Gain and epsilon of an RMSNorm; some modules, Gemma's, store how far the gain is from 1, and are asked.

    Raises AttributeError if the module is no RMSNorm.
    """
    weight = module.weight.detach()
    epsilon = float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)
    shifted = 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
    got = module(torch.ones_like(weight)[None])[0]
    is_shifted = (got - shifted).abs().sum() < (got - weight).abs().sum()
    return (shifted if is_shifted else weight), epsilon


def rms(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm of the last dimension of `x`, in the dtype of `x`."""
    gain, epsilon = norm
    return F.rms_norm(x.to(gain.dtype), gain.shape, gain, epsilon).to(x.dtype)


def activation_name(activation: Callable[[Tensor], Tensor]) -> str:
    """The key in ACTIVATIONS of what `activation` computes; empty if it is none of them."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    got = activation(x)
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(got, known(x), rtol=0, atol=1e-9)), "")


def rotary_kinds(model: Any) -> list[str | None]:
    """By layer, which of several tables the rotary embedding of a decoder gives it; None where there is one only."""
    layers, rotary = model.layers, model.rotary_emb
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return [None] * len(layers)
    return list(model.config.layer_types[: len(layers)])


def rotary_embedding(rotary: Any, like: Tensor, positions: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `positions` [N] as a decoder layer is given them, [1, N, rotary_dim], in `like`'s dtype."""
    options = {} if kind is None else {"layer_type": kind}
    cos, sin = rotary(like[:1].unsqueeze(0), positions.unsqueeze(0), **options)
    return cos, sin


def rotary_table(rotary: Any, positions: Tensor, like: Tensor, kind: str | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sign-folded sines [N, 1, rotary_dim] of `positions` [N], in the dtype of `like`."""
    cos, sin = rotary_embedding(rotary, like, positions, kind)
    half = cos.shape[-1] // 2
    signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
    return cos[0].unsqueeze(1).contiguous(), signed.unsqueeze(1).contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [N, H, D], its first rotary_dim numbers rotated by `cos`, `sin` [N, 1, rotary_dim], the others not."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], dim=-1)
    return torch.addcmul(x * cos, x.roll(size // 2, -1), sin)
