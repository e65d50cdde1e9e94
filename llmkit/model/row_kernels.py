"""Matrix products of a few rows, with the RMSNorm before and the activation or sum behind them in the same kernel.

A decode step of few rows is bound by reading weights. Each program reads its part of them into registers before it
waits for the kernel in front (programmatic dependent launch), so that weights flow while activations settle. Products
are exact in float32; nothing is rounded between norm, product, bias, activation and sum.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit.cuda import overlap, wait_for_previous

MAX_ROWS, MAX_SIZE = 4, 4096
"""More rows, or rows of more numbers in all, are left to tensor cores."""
WHOLE_WIDTH = 4096
"""Inputs up to this width are read at once, wider ones in chunks of it."""
TILE = 16384
"""Weights a program holds in registers."""

Norm = tuple[Tensor, float]


def multiply_rows(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None],
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`norm(x) @ weight.T + bias`, plus `residual`, or with `gated` silu of its first half times its second.

    `x` [M, K], contiguous, M up to MAX_ROWS; `weights` are `weight` [N, K], contiguous, and `bias` [N] or None;
    `norm` is RMSNorm's weight [K] and epsilon; `residual` [M, N]. Returns [M, N], or [M, N / 2] if `gated`.
    """
    (weight, bias), (rows, width) = weights, x.shape
    outputs = len(weight) // 2 if gated else len(weight)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    chunk = min(triton.next_power_of_2(width), WHOLE_WIDTH)
    columns = max(1, TILE // chunk // (2 if gated else 1))
    gain, epsilon = norm if norm is not None else (weight, 0.0)
    _multiply_rows[(triton.cdiv(outputs, columns),)](
        x, gain, weight, weight if bias is None else bias, x if residual is None else residual, out, epsilon, outputs,
        ROWS=rows, WIDTH=width, COLUMNS=columns, CHUNK=chunk, NORM=norm is not None, BIAS=bias is not None,
        ADDS=residual is not None, GATED=gated, **overlap(x.device), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _multiply_rows(
    x, gain, weight, bias, residual, out, epsilon, outputs,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr, ADDS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for COLUMNS outputs of all rows."""
    column, k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, CHUNK)
    row = tl.arange(0, triton.next_power_of_2(ROWS))
    inside = column < outputs
    at = column.to(tl.int64)[:, None] * WIDTH + k[None, :]
    upper = outputs.to(tl.int64) * WIDTH if GATED else 0
    here = inside[:, None] & (k < WIDTH)[None, :]
    first = tl.load(weight + at, mask=here, other=0.0, eviction_policy="evict_first")
    second = tl.load(weight + upper + at, mask=here, other=0.0, eviction_policy="evict_first") if GATED else first
    wait_for_previous(PDL)
    squares = tl.zeros([triton.next_power_of_2(ROWS)], tl.float32)
    products = tl.zeros([COLUMNS, triton.next_power_of_2(ROWS)], tl.float32)
    others = products
    for start in tl.static_range(0, WIDTH, CHUNK):
        read = start + k < WIDTH
        now, beside = first.to(tl.float32), second.to(tl.float32)
        if start + CHUNK < WIDTH:
            ahead = inside[:, None] & (start + CHUNK + k < WIDTH)[None, :]
            first = tl.load(weight + at + start + CHUNK, mask=ahead, other=0.0, eviction_policy="evict_first")
            if GATED:
                second = tl.load(
                    weight + upper + at + start + CHUNK, mask=ahead, other=0.0, eviction_policy="evict_first"
                )
        scale = tl.load(gain + start + k, mask=read, other=0.0).to(tl.float32) if NORM else 1.0
        for m in tl.static_range(ROWS):
            value = tl.load(x + m * WIDTH + start + k, mask=read, other=0.0).to(tl.float32)
            if NORM:
                squares += tl.where(row == m, tl.sum(value * value, 0), 0.0)
                value = value * scale
            products += tl.where(row == m, tl.sum(now * value[None, :], 1)[:, None], 0.0)
            if GATED:
                others += tl.where(row == m, tl.sum(beside * value[None, :], 1)[:, None], 0.0)
    if NORM:
        scales = tl.rsqrt(squares / WIDTH + epsilon)[None, :]
        products, others = products * scales, others * scales
    if BIAS:
        products += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if BIAS:
            others += tl.load(bias + outputs + column, mask=inside, other=0.0).to(tl.float32)[:, None]
        products = products * tl.sigmoid(products) * others
    target = row[None, :] * outputs + column[:, None]
    real = inside[:, None] & (row < ROWS)[None, :]
    if ADDS:
        products += tl.load(residual + target, mask=real, other=0.0).to(tl.float32)
    tl.store(out + target, products.to(out.dtype.element_ty), mask=real)
