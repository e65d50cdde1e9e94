"""What stands between the matrix products of a fused layer, one Triton kernel each; sums and products in float32."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit.cuda import narrowed, overlap, wait_for_previous
from llmkit.interfaces.attention import KeyValueSlots
from llmkit.model.gate_kernel import gated
from llmkit.model.row_kernels import MAX_ROWS, MAX_SIZE, multiply_rows
from llmkit.model.structure import Norm
from llmkit.model.tile_kernels import MAX_ROWS as MAX_TILED_ROWS
from llmkit.model.tile_kernels import MAX_WEIGHTS, Normed, multiply, multiply_and_norm

Ahead = Tensor | Normed | None
"""What a layer leaves to the next one: a sum to take, or its norm as far as it goes."""


def run(layer: Any, hidden: Tensor, ahead: Ahead, cos: Tensor, sin: Tensor, attend: Any) -> tuple[Tensor, Ahead]:
    """A `FusedLayer` on `hidden` [N, hidden_size] and what is `ahead`; arguments and result as `FusedLayer.extend`."""
    rows, width = hidden.shape
    if ahead is None and rows <= MAX_ROWS and rows * width <= MAX_SIZE and layer.is_plain:
        return run_few(layer, hidden, cos, sin, attend), None
    if rows <= MAX_TILED_ROWS and layer.is_plain and is_small(layer):
        return run_tiles(layer, hidden, ahead, cos, sin, attend)
    spec = layer.spec
    hidden, normed = add_rms_norm(hidden, None if isinstance(ahead, Normed) else ahead, layer.input_norm)
    qkv = layer.qkv(normed).view(rows, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
    context = rotate_and_attend(layer, qkv, cos, sin, attend)
    hidden, normed = add_rms_norm(hidden, layer.out(context), layer.post_norm, layer.after_attention)
    update = layer.feed_forward(normed)
    if layer.after_feed_forward is not None:
        update = add_rms_norm(update, None, layer.after_feed_forward)[1]
    return hidden, update


def is_small(layer: Any) -> bool:
    """Whether kernel boundaries cost more than reading the weights of each product."""
    weights = [*layer.weights.values(), *layer.feed_forward.weights.values()]
    return all(weight.numel() <= MAX_WEIGHTS for weight, _ in weights)


def run_tiles(layer: Any, hidden: Tensor, ahead: Ahead, cos: Tensor, sin: Tensor, attend: Any) -> tuple[Tensor, Ahead]:
    """A `FusedLayer` for some dozens of tokens: norms, activation and sums are parts of the products."""
    spec, feed_forward = layer.spec, layer.feed_forward.weights
    normed: Tensor | Normed
    if isinstance(ahead, Normed):
        normed = ahead
    else:
        hidden, normed = add_rms_norm(hidden, ahead, layer.input_norm)
    heads = multiply(normed, layer.weights["qkv"]).view(len(hidden), -1, spec.head_dim)
    context = rotate_and_attend(layer, heads, cos, sin, attend)
    hidden, normed = multiply_and_norm(context, layer.weights["out"], hidden, layer.post_norm)
    inner = multiply(normed, feed_forward["gate_up"], gated=True)
    if layer.next_norm is None:
        return multiply(inner, feed_forward["down"], hidden), None
    return multiply_and_norm(inner, feed_forward["down"], hidden, layer.next_norm)


def run_few(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
    """A `FusedLayer` for few tokens: norms, activation and sums are parts of the products."""
    spec, feed_forward = layer.spec, layer.feed_forward.weights
    qkv = multiply_rows(hidden, layer.weights["qkv"], norm=layer.input_norm)
    heads = qkv.view(len(hidden), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
    context = rotate_and_attend(layer, heads, cos, sin, attend)
    hidden = multiply_rows(context, layer.weights["out"], residual=hidden)
    inner = multiply_rows(hidden, feed_forward["gate_up"], norm=layer.post_norm, gated=True)
    return multiply_rows(inner, feed_forward["down"], residual=hidden)


def rotate_and_attend(layer: Any, qkv: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
    """Attention of `qkv` [N, num_heads + 2 num_kv_heads, D], flattened: [N, num_heads D]."""
    spec, slots = layer.spec, attend.slots()
    num_heads, num_rotated = spec.num_heads, spec.num_heads + spec.num_kv_heads
    rotated = norm_and_rotate(qkv, num_heads, spec.num_kv_heads, layer.q_norm, layer.k_norm, cos, sin, slots)
    if slots is not None:
        context: Tensor = attend.over_slots(rotated)
    else:
        context = attend(rotated[:, :num_heads], rotated[:, num_heads:], qkv[:, num_rotated:])
    return context.view(len(qkv), -1)


def add_rms_norm(x: Tensor, delta: Tensor | None, norm: Norm, of_delta: Norm | None = None) -> tuple[Tensor, Tensor]:
    """`x + delta` (or `x`) and its RMSNorm with weight and epsilon `norm`; all [N, width], contiguous.

    What is added is RMSNorm of `delta` with `of_delta` if that is given.
    """
    weight, epsilon = norm
    rows, width = x.shape
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _add_rms_norm[(rows,)](
        x, delta if delta is not None else x, weight, of_delta[0] if of_delta is not None else weight, total, out,
        epsilon, of_delta[1] if of_delta is not None else 0.0, width,
        ADDS=delta is not None, NORMS=of_delta is not None, BLOCK=block, **overlap(x.device),
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return total, out


def norm_and_rotate(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Norm | None,
    k_norm: Norm | None,
    cos: Tensor,
    sin: Tensor,
    slots: KeyValueSlots | None = None,
) -> Tensor:
    """Queries and keys of `qkv` [N, num_heads + 2 num_kv_heads, D], normalised per head if asked, then rotated.

    `cos`, `sin` [N, 1, up to D], contiguous, with the sign of the rotation folded into `sin`; numbers behind are not
    rotated. Returns both, [N, num_heads + num_kv_heads, D], or stores keys and values in `slots` and returns the
    queries [N, num_heads, D].
    """
    rows, all_heads, head_dim = qkv.shape
    kept = num_heads if slots is not None else num_heads + num_kv_heads
    out = torch.empty(rows, kept, head_dim, dtype=qkv.dtype, device=qkv.device)
    q_weight, epsilon = q_norm if q_norm is not None else (cos, 0.0)
    k_weight = k_norm[0] if k_norm is not None else cos
    keys, values, places = (slots.keys, slots.values, slots.slot_mapping) if slots is not None else (out, out, out)
    _norm_and_rotate[(rows,)](
        qkv, q_weight, k_weight, cos, sin, out, keys, values, places, epsilon, num_heads, num_heads + num_kv_heads,
        all_heads, head_dim, cos.shape[-1], NORMS=q_norm is not None,
        HEADS=triton.next_power_of_2(num_heads + num_kv_heads),
        KV_HEADS=triton.next_power_of_2(num_kv_heads), WIDTH=triton.next_power_of_2(head_dim),
        PAGE=keys.shape[2], STORES=slots is not None, **overlap(qkv.device), num_warps=4,
    )  # fmt: skip
    return out


def activate_and_multiply(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of `gate_up` [N, 2 width], contiguous -> [N, width]; names as in `gate_kernel`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    _activate_and_multiply[(rows, triton.cdiv(width, 1024))](
        gate_up, out, width, ACTIVATION=activation, BLOCK=1024, **overlap(gate_up.device), num_warps=4
    )
    return out


@triton.jit
def _add_rms_norm(
    x, delta, weight, delta_weight, total, out, epsilon, delta_epsilon, width, ADDS: tl.constexpr, NORMS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        update = tl.load(delta + row + column, mask=inside, other=0.0).to(tl.float32)
        if NORMS:
            update *= tl.rsqrt(tl.sum(update * update, 0) / width + delta_epsilon)
            update *= tl.load(delta_weight + column, mask=inside, other=0.0).to(tl.float32)
        value += update
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, (value * scale * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_and_rotate(
    qkv, q_weight, k_weight, cos, sin, out, keys, values, slots, epsilon, num_heads, num_rotated, all_heads, head_dim,
    rotary_dim, NORMS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    PAGE: tl.constexpr, STORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    turns = column < rotary_dim
    partner = tl.where(turns, (column + rotary_dim // 2) % rotary_dim, column)
    inside = (head < num_rotated) & (column < head_dim)
    source = qkv + (row * all_heads + head) * head_dim
    x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(x * x, 1) / head_dim + epsilon)[:, None]
        is_query = head < num_heads
        queries, others = inside & is_query, inside & (head >= num_heads)
        gain = tl.load(q_weight + column + 0 * head, mask=queries, other=0.0).to(tl.float32)
        gain += tl.load(k_weight + column + 0 * head, mask=others, other=0.0).to(tl.float32)
        partner_gain = tl.load(q_weight + partner + 0 * head, mask=queries, other=0.0).to(tl.float32)
        partner_gain += tl.load(k_weight + partner + 0 * head, mask=others, other=0.0).to(tl.float32)
        x, y = x * scale * gain, y * scale * partner_gain
    cosine = tl.load(cos + row * rotary_dim + column, mask=turns, other=1.0).to(tl.float32)
    sine = tl.load(sin + row * rotary_dim + column, mask=turns, other=0.0).to(tl.float32)
    rotated = (x * cosine + y * sine).to(out.dtype.element_ty)
    if STORES:
        tl.store(out + (row * num_heads + head) * head_dim + column, rotated, mask=inside & (head < num_heads))
        slot, kv_heads = tl.load(slots + row), num_rotated - num_heads
        if slot >= 0:
            place = slot // PAGE * kv_heads * PAGE + slot % PAGE
            stored = (place + (head - num_heads) * PAGE) * head_dim + column
            tl.store(keys + stored, narrowed(rotated, keys.dtype.element_ty), mask=inside & (head >= num_heads))
            member = tl.arange(0, KV_HEADS)[:, None]
            real = (member < kv_heads) & (column < head_dim)
            value = tl.load(qkv + (row * all_heads + num_rotated + member) * head_dim + column, mask=real, other=0.0)
            value = narrowed(value, values.dtype.element_ty)
            tl.store(values + (place + member * PAGE) * head_dim + column, value, mask=real)
    else:
        tl.store(out + (row * num_rotated + head) * head_dim + column, rotated, mask=inside)


@triton.jit
def _activate_and_multiply(
    gate_up, out, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, gated(gate, up, ACTIVATION).to(out.dtype.element_ty), mask=inside)
