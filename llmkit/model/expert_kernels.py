"""Experts in Triton: a router's choice, and the products of all experts with the tokens that chose them.

Nothing is read back by the host and every grid depends on shapes only, so that a step can be captured in a CUDA graph.
Each expert has a list of its members, (token, place) pairs, of which it takes tiles; the order of members in a list
differs from run to run, but no number depends on it.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit.cuda import overlap, wait_for_previous
from llmkit.model.gate_kernel import gated

GROUP = 8
"""Tiles of tokens that run beside each other, so that they find their expert's weights in the cache."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Pair p = token * K + place: `weights` [N, K]; `counts` int32 [E] of the experts' pairs, listed in the first
    places of their rows of `members` int32 [E, N]."""

    weights: Tensor
    counts: Tensor
    members: Tensor


@dataclass(frozen=True, slots=True)
class _Tile:
    """What a program takes of tokens, of outputs (in all, gate and up together) and of inputs at a time."""

    tokens: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


def route(logits: Tensor, top_k: int, normalises: bool) -> Routing:
    """The `top_k` likeliest experts of every token by `logits` [N, E], the lowest of equals first.

    Their weights are the softmax over all experts, in float32, divided by their sum if `normalises`.
    """
    (rows, num_experts), device = logits.shape, logits.device
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=device)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
    members = torch.empty(num_experts, rows, dtype=torch.int32, device=device)
    _route[(rows,)](
        logits, weights, counts, members, rows, num_experts, TOP_K=top_k, PLACES=triton.next_power_of_2(top_k),
        EXPERTS=triton.next_power_of_2(num_experts), NORMALISES=normalises, **overlap(device), num_warps=1,
    )  # fmt: skip
    return Routing(weights, counts, members)


def routing_of(weights: Tensor, chosen: Tensor, num_experts: int) -> Routing:
    """What another router has chosen: `weights` [N, K] and experts `chosen` int64 [N, K], each once a token."""
    (rows, top_k), device = chosen.shape, chosen.device
    counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
    members = torch.empty(num_experts, rows, dtype=torch.int32, device=device)
    _list_members[(rows,)](
        chosen.contiguous(), counts, members, rows, TOP_K=top_k, PLACES=triton.next_power_of_2(top_k),
        **overlap(device), num_warps=1,
    )  # fmt: skip
    return Routing(weights.float().contiguous(), counts, members)


def multiply_experts(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """The weighted sum of what each token's experts make of it: `x` [N, H], contiguous -> [N, H].

    `gate_up` [E, 2 * width, H] and `down` [E, H, width], contiguous; `activation` as in `gate_kernel`.
    """
    (rows, top_k), (_, hidden, width) = routing.weights.shape, down.shape
    inner = torch.empty(rows * top_k, width, dtype=x.dtype, device=x.device)
    parts = torch.empty(rows * top_k, hidden, dtype=x.dtype, device=x.device)
    _launch(x, routing, gate_up, inner, activation)
    _launch(inner, routing, down, parts, "")
    out = torch.empty_like(x)
    _sum_of_places[(rows, triton.cdiv(hidden, 1024))](
        parts, out, hidden, TOP_K=top_k, BLOCK=1024, **overlap(x.device), num_warps=4
    )
    return out


def _launch(x: Tensor, routing: Routing, weight: Tensor, out: Tensor, activation: str) -> None:
    rows, top_k = routing.weights.shape
    num_experts, _, inputs = weight.shape
    tile = _tile(rows * top_k, num_experts, x.dtype)
    columns = tile.outputs // 2 if activation else tile.outputs
    # Experts have at most one tile more than what they fill, and those with no member have none.
    num_tiles = min(num_experts, rows * top_k) + rows * top_k // tile.tokens
    num_columns = triton.cdiv(out.shape[1], columns)
    _multiply_experts[(num_tiles * num_columns,)](
        x, weight, routing.weights, routing.counts, routing.members, out, rows, num_experts, out.shape[1], num_tiles,
        INPUTS=inputs, SHARED_BY=top_k if activation else 1, ACTIVATION=activation,
        EXPERTS=triton.next_power_of_2(num_experts), TOKENS=tile.tokens, COLUMNS=columns, CHUNK=tile.inputs,
        GROUP=GROUP, PRECISION="ieee" if x.dtype is torch.float32 else "tf32", **overlap(x.device),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _tile(num_pairs: int, num_experts: int, dtype: torch.dtype) -> _Tile:
    """Few members an expert leave it bound by reading weights, many by tensor cores."""
    members = num_pairs / num_experts
    if dtype is torch.float32:
        return _Tile(16, 32, 32, 4, 2)
    if members <= 16:
        return _Tile(16, 64, 128, 4, 4)
    if members <= 64:
        return _Tile(64, 128, 64, 4, 4)
    return _Tile(128, 256, 64, 8, 4)


@triton.jit(do_not_specialize=["rows"])
def _route(
    logits, weights, counts, members, rows, num_experts, TOP_K: tl.constexpr, PLACES: tl.constexpr,
    EXPERTS: tl.constexpr, NORMALISES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    row = tl.program_id(0)
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, PLACES)
    value = tl.load(logits + row * num_experts + expert, mask=expert < num_experts, other=float("-inf")).to(tl.float32)
    mass = tl.exp(value - tl.max(value, 0))
    left = mass / tl.sum(mass, 0)
    # A row that is not a number has experts all the same, each once, so that nothing is written out of place.
    left = tl.where((left == left) & (expert < num_experts), left, tl.where(expert < num_experts, 0.0, -2.0))
    best, chosen = tl.zeros([PLACES], tl.float32), tl.zeros([PLACES], tl.int32)
    for index in tl.static_range(TOP_K):
        highest = tl.max(left, 0)
        first = tl.min(tl.where(left == highest, expert, EXPERTS), 0)
        best, chosen = tl.where(place == index, highest, best), tl.where(place == index, first, chosen)
        left = tl.where(expert == first, -1.0, left)
    if NORMALISES:
        best = best / tl.sum(best, 0)
    tl.store(weights + row * TOP_K + place, best, mask=place < TOP_K)
    _join(row * TOP_K + place, chosen, place < TOP_K, counts, members, rows)


@triton.jit(do_not_specialize=["rows"])
def _list_members(chosen, counts, members, rows, TOP_K: tl.constexpr, PLACES: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous(PDL)
    place = tl.arange(0, PLACES)
    pair = tl.program_id(0) * TOP_K + place
    expert = tl.load(chosen + pair, mask=place < TOP_K, other=0).to(tl.int32)
    _join(pair, expert, place < TOP_K, counts, members, rows)


@triton.jit
def _join(pair, expert, real, counts, members, rows):
    """Append pairs to their experts' lists."""
    number = tl.atomic_add(counts + expert, 1, mask=real)
    tl.store(members + expert.to(tl.int64) * rows + number, pair, mask=real)


@triton.jit(do_not_specialize=["rows", "num_tiles"])
def _multiply_experts(
    x, weight, weights, counts, members, out, rows, num_experts, outputs, num_tiles,
    INPUTS: tl.constexpr, SHARED_BY: tl.constexpr, ACTIVATION: tl.constexpr, EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program for TOKENS members of an expert and COLUMNS outputs of each: row `pair // SHARED_BY` of `x` times the
    expert's weight into row `pair` of `out`, through the gate if there is one, times the pair's weight if not."""
    wait_for_previous(PDL)
    num_columns = tl.cdiv(outputs, COLUMNS)
    group = tl.program_id(0) // (GROUP * num_columns)
    size = min(num_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) - group * GROUP * num_columns
    tile, column = group * GROUP + within % size, within // size * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.arange(0, EXPERTS)
    count = tl.load(counts + index, mask=index < num_experts, other=0)
    ends = tl.cumsum((count + TOKENS - 1) // TOKENS, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    if expert >= num_experts:
        return
    is_mine = index == expert
    num_members = tl.sum(tl.where(is_mine, count, 0), 0)
    first = tl.sum(tl.where(is_mine, ends - (count + TOKENS - 1) // TOKENS, 0), 0)
    number = (tile - first) * TOKENS + tl.arange(0, TOKENS)
    real = number < num_members
    pair = tl.load(members + expert.to(tl.int64) * rows + number, mask=real, other=0)
    k = tl.arange(0, CHUNK)
    source = x + (pair // SHARED_BY).to(tl.int64)[:, None] * INPUTS + k[None, :]
    # Columns behind the last read others again instead of a mask; they are not stored.
    at = (column % outputs).to(tl.int64)[None, :] * INPUTS + k[:, None]
    GATED: tl.constexpr = ACTIVATION != ""
    mine = weight + expert.to(tl.int64) * outputs * (2 if GATED else 1) * INPUTS + at
    products = tl.zeros([TOKENS, COLUMNS], tl.float32)
    others = products
    for start in range(0, INPUTS, CHUNK):
        if INPUTS % CHUNK == 0:
            values, first_half = tl.load(source + start), tl.load(mine + start)
        else:
            read = start + k < INPUTS
            values = tl.load(source + start, mask=read[None, :], other=0.0)
            first_half = tl.load(mine + start, mask=read[:, None], other=0.0)
        products = tl.dot(values, first_half, products, input_precision=PRECISION)
        if GATED:
            upper = mine + outputs.to(tl.int64) * INPUTS + start
            if INPUTS % CHUNK == 0:
                second_half = tl.load(upper)
            else:
                second_half = tl.load(upper, mask=(start + k < INPUTS)[:, None], other=0.0)
            others = tl.dot(values, second_half, others, input_precision=PRECISION)
    if GATED:
        products = gated(products, others, ACTIVATION)
    else:
        products = products * tl.load(weights + pair, mask=real, other=0.0)[:, None]
    target = out + pair.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(target, products.to(out.dtype.element_ty), mask=real[:, None] & (column < outputs)[None, :])


@triton.jit
def _sum_of_places(parts, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(TOP_K):
        total += tl.load(parts + (row * TOP_K + place) * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)
