"""The feed-forward half of a fused layer: a gated product, or experts chosen by a router for each token.

On an NVIDIA GPU what stands between the products, and the products of experts, are Triton kernels; elsewhere torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmkit.model.linear import linear, merge
from llmkit.model.structure import activation_name


def feed_forward(mlp: Any) -> GatedLayer | ExpertLayer:
    """The fused form of a feed-forward module. Raises AttributeError or ValueError if its structure is another."""
    return ExpertLayer(mlp) if hasattr(mlp, "experts") else GatedLayer(mlp)


def takes_kernels(weight: Tensor) -> bool:
    """Whether Triton kernels compute with `weight`: on an NVIDIA GPU, unless in float64."""
    return weight.device.type == "cuda" and weight.dtype is not torch.float64


def is_silu(layer: GatedLayer | ExpertLayer) -> bool:
    """Whether `layer` is a gated product with SiLU that Triton kernels compute."""
    return isinstance(layer, GatedLayer) and layer.kernel_activation == "silu"


class GatedLayer:
    """`down(activation(gate(x)) * up(x))`, with gate and up as one product."""

    def __init__(self, mlp: Any) -> None:
        merged = mlp.gate_up_proj if hasattr(mlp, "gate_up_proj") else None
        self.activation: Callable[[Tensor], Tensor] = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
        self.weights = {
            "gate_up": merge([mlp.gate_proj, mlp.up_proj]) if merged is None else (merged.weight, merged.bias),
            "down": (mlp.down_proj.weight, mlp.down_proj.bias),
        }
        self.gate_up, self.down = (linear(*pair) for pair in self.weights.values())
        self.kernel_activation = activation_name(self.activation) if takes_kernels(mlp.down_proj.weight) else ""

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [N, hidden_size] -> [N, hidden_size]."""
        gate_up = self.gate_up(x)
        if self.kernel_activation:
            from llmkit.model.layer_kernels import activate_and_multiply

            return self.down(activate_and_multiply(gate_up, self.kernel_activation))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class ExpertLayer:
    """Each token's sum over the experts its router chose, by weight, and over an expert that all tokens share if any.

    The weights of all experts are `gate_up` [E, 2 * width, hidden_size] and `down` [E, hidden_size, width].
    """

    def __init__(self, mlp: Any) -> None:
        self.router, self.gate_up, self.down = mlp.gate, mlp.experts.gate_up_proj, mlp.experts.down_proj
        self.activation: Callable[[Tensor], Tensor] = mlp.experts.act_fn
        num_experts, hidden_size, width = self.down.shape
        if self.gate_up.shape != (num_experts, 2 * width, hidden_size):
            raise ValueError(f"experts of shapes {tuple(self.gate_up.shape)} and {tuple(self.down.shape)}")
        shared = [getattr(mlp, name, None) for name in ("shared_expert", "shared_experts", "shared_mlp")]
        self.shared = next((GatedLayer(module) for module in shared if module is not None), None)
        self.shared_gate: Any = getattr(mlp, "shared_expert_gate", None)
        self.softmax_router: tuple[Tensor, int, bool] | None = None
        self.kernel_activation = activation_name(self.activation) if takes_kernels(self.down) else ""
        if self.kernel_activation:
            self.softmax_router = softmax_router(self.router, hidden_size)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [N, hidden_size] -> [N, hidden_size]."""
        out = self._experts_by_kernels(x) if self.kernel_activation else self._experts(x)
        if self.shared is None:
            return out
        shared = self.shared(x)
        return out + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * shared)

    def _experts(self, x: Tensor) -> Tensor:
        """One expert after the other; which are wanted is read back from the device."""
        _, weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, places = torch.where(chosen == expert)
            gate, up = F.linear(x[tokens], self.gate_up[expert]).chunk(2, dim=-1)
            update = F.linear(self.activation(gate) * up, self.down[expert]) * weights[tokens, places, None]
            out.index_add_(0, tokens, update.to(out.dtype))
        return out

    def _experts_by_kernels(self, x: Tensor) -> Tensor:
        """All at once, nothing read back, so that the step can be captured in a graph."""
        from llmkit.model import expert_kernels as kernels

        if self.softmax_router is None:
            _, weights, chosen = self.router(x)
            routing = kernels.routing_of(weights, chosen, len(self.down))
        else:
            weight, top_k, normalises = self.softmax_router
            routing = kernels.route(F.linear(x, weight), top_k, normalises)
        return kernels.multiply_experts(x, routing, self.gate_up, self.down, self.kernel_activation)


def softmax_router(router: Any, width: int) -> tuple[Tensor, int, bool] | None:
    """Weight, number of experts a token, and whether their weights are made to sum to 1, if that is what `router` is.

    None if it computes anything but a softmax over one product and its largest entries.
    """
    weight, top_k = getattr(router, "weight", None), getattr(router, "top_k", None)
    if weight is None or top_k is None or getattr(router, "bias", None) is not None:
        return None
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    _, wanted, chosen = router(x)
    for normalises in (True, False):
        weights, experts = torch.softmax(F.linear(x, weight).float(), dim=-1).topk(top_k, dim=-1)
        if normalises:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if torch.equal(experts, chosen) and torch.allclose(weights, wanted.float(), rtol=1e-2, atol=1e-6):
            return weight, top_k, normalises
    return None
