"""Linear layers of the fused network: merged projections, and weights packed once where that pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from llmkit.model.products import Product, has_choice

PACK_LIMIT_BYTES = 256 << 20
"""A packed weight is a second copy, so only small ones are packed."""

Linear = Callable[[torch.Tensor], torch.Tensor]


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """`x @ weight.T + bias` for `weight` [out, in].

    On CPUs with native bfloat16 the weight is brought into oneDNN's blocked layout here instead of in every call,
    which halves the time of a decode step's products (the operators are those torch's own compiler emits). On a GPU
    large products choose between two libraries.
    """
    if has_choice(weight, bias):
        return Product(weight)
    if not _packs(weight):
        return lambda x: F.linear(x, weight, bias)
    operators: Any = torch.ops.mkldnn
    packed = operators._reorder_linear_weight(weight, None)
    run = operators._linear_pointwise.default

    def packed_linear(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = run(x, packed, bias, "none", [], "")
        return out

    return packed_linear


def merge(projections: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack the weights and biases of linear modules, and make the modules' weights views of the stack.

    Weights that are views of such a stack already, made for another engine on the same model, are not copied again.
    """
    weights = [projection.weight for projection in projections]
    weight = _stack_of(weights)
    if weight is None:
        weight = torch.cat(weights)
        for projection, part in zip(projections, torch.split(weight, [len(w) for w in weights]), strict=True):
            projection.weight = torch.nn.Parameter(part, requires_grad=False)
    if projections[0].bias is None:
        return weight, None
    return weight, torch.cat([p.bias for p in projections])


def _stack_of(weights: list[torch.Tensor]) -> torch.Tensor | None:
    """The matrix whose rows `weights` already are, without gaps and in this order, if there is one."""
    end = weights[0].data_ptr()
    storage = weights[0].untyped_storage().data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage or not weight.is_contiguous():
            return None
        end += weight.nbytes
    return weights[0].as_strided((sum(len(weight) for weight in weights), weights[0].shape[1]), weights[0].stride())


def _packs(weight: torch.Tensor) -> bool:
    onednn: Any = torch.backends.mkldnn
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and weight.numel() * weight.itemsize <= PACK_LIMIT_BYTES
        and onednn.is_available()
        and torch.cpu._is_avx512_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
