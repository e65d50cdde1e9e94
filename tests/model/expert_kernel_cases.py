"""The kernels of experts against float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmkit.model import expert_kernels as kernels
from llmkit.model.feed_forward import softmax_router
from llmkit.model.structure import ACTIVATIONS
from tests.model.layer_kernel_cases import DEVICE, DTYPES, close, noise


def routed(rows: int, num_experts: int, top_k: int, skew: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weights [N, K] that sum to 1 and distinct experts [N, K]; `skew` sends tokens to the first ones."""
    logits = noise(rows, num_experts, dtype=torch.float32, seed=7) - skew * torch.arange(num_experts, device=DEVICE)
    weights, chosen = torch.softmax(logits, -1).topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), chosen


def dense(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Every expert on every token in float64, and those that were not chosen times 0."""
    share = torch.zeros(len(x), len(down), dtype=torch.float64, device=x.device).scatter(1, chosen, weights.double())
    gate, up = torch.einsum("nh,eih->nei", x.double(), gate_up.double()).chunk(2, dim=-1)
    return torch.einsum("nei,ehi,ne->nh", ACTIVATIONS[activation](gate) * up, down.double(), share)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize(("rows", "num_experts", "top_k"), [(1, 8, 2), (5, 6, 3), (33, 128, 8), (7, 4, 4), (3, 2, 1)])
def test_route(dtype: torch.dtype, normalises: bool, rows: int, num_experts: int, top_k: int) -> None:
    # No two alike: which of equals comes first is not torch's business.
    logits = noise(rows, num_experts, dtype=torch.float32).argsort(-1).to(dtype) / 16
    got = kernels.route(logits, top_k, normalises)
    weights, chosen = torch.softmax(logits.float(), -1).topk(top_k, dim=-1)
    close(got.weights, (weights / weights.sum(-1, keepdim=True) if normalises else weights).double())
    assert listed(got) == expected(chosen, num_experts)
    assert listed(kernels.routing_of(weights, chosen, num_experts)) == expected(chosen, num_experts)


def listed(routing: kernels.Routing) -> list[list[int]]:
    counts, members = routing.counts.tolist(), routing.members.tolist()
    return [sorted(row[:count]) for count, row in zip(counts, members, strict=True)]


def expected(chosen: Tensor, num_experts: int) -> list[list[int]]:
    flat = chosen.flatten().tolist()
    return [[pair for pair, expert in enumerate(flat) if expert == number] for number in range(num_experts)]


def test_the_lowest_of_equals_come_first() -> None:
    got = kernels.route(torch.zeros(2, 6, device=DEVICE), 3, normalises=True)
    assert listed(got) == [[0, 3], [1, 4], [2, 5], [], [], []]
    close(got.weights, torch.full((2, 3), 1 / 3, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_chooses_each_expert_once(broken: float) -> None:
    """Else a list would grow beyond its room and be written out of place."""
    logits = noise(3, 6, dtype=torch.float32)
    logits[1] = broken
    lists = listed(kernels.route(logits, 4, normalises=True))
    assert sorted(pair for pairs in lists for pair in pairs) == list(range(12))
    assert all(len({pair // 4 for pair in pairs}) == len(pairs) for pairs in lists)


SHAPES = [
    # rows, experts, top_k, hidden_size, width
    (1, 8, 2, 64, 40),
    (3, 128, 8, 64, 24),
    (5, 4, 2, 128, 72),
    (40, 3, 2, 100, 130),
    (70, 2, 1, 64, 48),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize(("rows", "num_experts", "top_k", "hidden_size", "width"), SHAPES)
def test_experts(
    dtype: torch.dtype,
    activation: str,
    skew: float,
    rows: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    width: int,
) -> None:
    x = noise(rows, hidden_size, dtype=dtype)
    gate_up = noise(num_experts, 2 * width, hidden_size, dtype=dtype, seed=1)
    down = noise(num_experts, hidden_size, width, dtype=dtype, seed=2)
    weights, chosen = routed(rows, num_experts, top_k, skew)
    routing = kernels.routing_of(weights, chosen, num_experts)
    got = kernels.multiply_experts(x, routing, gate_up, down, activation)
    close(got, dense(x, weights, chosen, gate_up, down, activation))


@pytest.mark.parametrize("members", [40, 100])
def test_larger_tiles(members: int) -> None:
    """Enough tokens an expert for the tiles of prompts, of which the last are not full."""
    dtype, num_experts = torch.float16, 2
    x, weights, chosen = noise(members, 64, dtype=dtype), *routed(members, num_experts, 2)
    assert kernels._tile(2 * members, num_experts, dtype).tokens == (64 if members <= 64 else 128)
    gate_up, down = noise(num_experts, 2 * 40, 64, dtype=dtype, seed=1), noise(num_experts, 64, 40, dtype=dtype, seed=2)
    routing = kernels.routing_of(weights, chosen, num_experts)
    got = kernels.multiply_experts(x, routing, gate_up, down, "silu")
    close(got, dense(x, weights, chosen, gate_up, down, "silu"))


class Router(torch.nn.Module):
    """A router as transformers has them; `scale` is what the kernel does not know."""

    def __init__(self, normalises: bool, scale: float) -> None:
        super().__init__()
        self.weight, self.top_k = torch.nn.Parameter(noise(6, 16, dtype=torch.float32)), 2
        self.normalises, self.scale = normalises, scale

    def forward(self, x: Tensor) -> Any:
        logits = F.linear(x, self.weight)
        weights, chosen = torch.softmax(logits, -1).topk(self.top_k)
        return logits, self.scale * (weights / weights.sum(-1, keepdim=True) if self.normalises else weights), chosen


@torch.no_grad()
def test_a_router_is_told_by_what_it_computes() -> None:
    for normalises in (True, False):
        found = softmax_router(Router(normalises, 1.0), 16)
        assert found is not None and found[1:] == (2, normalises)
        assert softmax_router(Router(normalises, 1.5), 16) is None
