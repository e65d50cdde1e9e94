"""Matrix products of some dozens of rows on tensor cores, with what stands between a layer's products inside them.

With small weights a decode step of that many rows is bound by the boundaries between kernels. So a product takes in
the RMSNorm before it and the activation, sum or bias behind it, and brings its weights into the L2 cache before it
waits for the kernel in front (programmatic dependent launch).

The norm is split in two. Whoever writes hidden states also writes them times the gain of the norm to come, and sums of
squares; whoever reads them scales its products by what the squares say (`Normed`).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit.cuda import overlap
from llmkit.model.structure import Norm

MAX_ROWS = 128
"""More rows keep tensor cores busy: there cuBLAS with kernels in between is faster."""
MAX_WEIGHTS = 1 << 23
"""Products with more weights are bound by reading them, which cuBLAS does faster."""
MAX_TILES = 4096
Weights = tuple[Tensor, Tensor | None]


class Normed(NamedTuple):
    """RMSNorm in two parts: `scaled` [M, K] still lacks rsqrt(sum(`squares` [M, parts], float32) / K + `epsilon`)."""

    scaled: Tensor
    squares: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class Tiling:
    """A program multiplies `tile` rows of weights by `rows` rows of x, over one of `splits` parts of the width."""

    rows: int
    splits: int
    tile: int = 64
    chunk: int = 128
    stages: int = 3


def tiling(rows: int, features: int, width: int, itemsize: int = 2) -> Tiling:
    """How to cut `features` x `width` weights for `rows` of x: about one program a multiprocessor, if parts of the
    width stay long enough to be worth adding up. Wide numbers are multiplied without tensor cores, in small chunks."""
    block = 16 if rows <= 16 else 32 if rows <= 64 else 64
    programs, splits = triton.cdiv(features, 64) * triton.cdiv(rows, block), 1
    while programs * splits <= 100 and width >= 768 * splits:
        splits *= 2
    return Tiling(block, splits, chunk=128 if itemsize == 2 else 32)


def multiply(x: Tensor | Normed, weights: Weights, residual: Tensor | None = None, gated: bool = False) -> Tensor:
    """`x @ weight.T + bias`, plus `residual`, or with `gated` silu of its first half times its second.

    `x` [M, K], contiguous; `weights` are `weight` [N, K], contiguous, and `bias` [N] or None; `residual` [M, N].
    Returns [M, N], or [M, N / 2] if `gated`.
    """
    return _multiply(x, weights, residual, gated, None)[0]


def multiply_and_norm(
    x: Tensor | Normed, weights: Weights, residual: Tensor | None, norm: Norm
) -> tuple[Tensor, Normed]:
    """As `multiply`, and the RMSNorm of the result with weight [N] and epsilon `norm`."""
    return _multiply(x, weights, residual, False, norm)


def _multiply(
    x: Tensor | Normed, weights: Weights, residual: Tensor | None, gated: bool, norm: Norm | None
) -> tuple[Tensor, Normed]:
    (weight, bias), width = weights, weights[0].shape[1]
    given, squares, epsilon = x if isinstance(x, Normed) else (x, x, 0.0)
    rows, cut = len(given), tiling(len(given), len(weight), width, given.itemsize)
    outputs, tile = (len(weight) // 2, cut.tile // 2) if gated else (len(weight), cut.tile)
    tiles, blocks = triton.cdiv(outputs, tile), triton.cdiv(rows, cut.rows)
    out = given.new_empty(rows, outputs)
    scaled, sums, partial = out, out, out
    if norm is not None:
        scaled, sums = torch.empty_like(out), out.new_empty(rows, tiles, dtype=torch.float32)
    if cut.splits > 1:
        partial = out.new_empty(cut.splits * tiles * blocks * cut.tile * cut.rows, dtype=torch.float32)
    gain, next_epsilon = norm if norm is not None else (weight, 0.0)
    _multiply_tiles[(tiles, blocks, cut.splits)](
        given, squares, weight, weight if bias is None else bias, out if residual is None else residual, gain, out,
        scaled, sums, partial, _counters(given.device), epsilon, rows, outputs,
        WIDTH=width, ROWS=cut.rows, TILE=cut.tile, CHUNK=cut.chunk, SPLITS=cut.splits,
        PARTS=squares.shape[1] if isinstance(x, Normed) else 0, GATED=gated, BIAS=bias is not None,
        ADDS=residual is not None, NORMS=norm is not None,
        **overlap(given.device), num_warps=4, num_stages=cut.stages,
    )  # fmt: skip
    return out, Normed(scaled, sums, next_epsilon)


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that count the parts of each tile that are done; kernels leave them as zeros."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["rows"])
def _multiply_tiles(
    x, squares, weight, bias, residual, gain, out, scaled, sums, partial, arrivals, epsilon, rows, outputs,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
    PARTS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of features, block of rows, part of the width); the last part to arrive at a tile finishes it."""
    tile, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    HALF: tl.constexpr = TILE // 2 if GATED else TILE
    SHARE: tl.constexpr = (WIDTH + CHUNK * SPLITS - 1) // (CHUNK * SPLITS) * CHUNK
    feature, k = tl.arange(0, TILE), tl.arange(0, CHUNK)
    # Beyond the last feature and the last row the last one is read again; nothing is written there.
    named = tl.minimum(tile * HALF + feature % HALF, outputs - 1) + feature // HALF * outputs
    source = weight + named.to(tl.int64)[:, None] * WIDTH
    begin = split * SHARE
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        for first in tl.static_range(0, SHARE, 1024):
            _prefetch(source + begin + first, WIDTH - begin - first, min(1024, SHARE - first))
        tl.extra.cuda.gdc_wait()
    member = block * ROWS + tl.arange(0, ROWS)
    real = member < rows
    given = x + tl.minimum(member, rows - 1)[:, None] * WIDTH
    scale, shift, added, gains = _ahead(
        squares, bias, residual, gain, epsilon, outputs, tile, member, real,
        WIDTH, ROWS, TILE, PARTS, GATED, BIAS, ADDS, NORMS,
    )  # fmt: skip
    products = tl.zeros([TILE, ROWS], tl.float32)
    for start in range(begin, min(begin + SHARE, WIDTH), CHUNK):
        at = (start + k)[None, :]
        if WIDTH % CHUNK:
            read = tl.load(source + at, mask=at < WIDTH, other=0.0)
            held = tl.load(given + at, mask=at < WIDTH, other=0.0)
        else:
            read, held = tl.load(source + at), tl.load(given + at)
        products = tl.dot(read, tl.trans(held), products, input_precision="ieee")
    if SPLITS > 1:
        number, count = block * tl.num_programs(0) + tile, tl.num_programs(0) * tl.num_programs(1)
        inner = feature[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        tl.store(partial + (split * count + number) * (TILE * ROWS) + inner, products)
        tl.debug_barrier()
        before = tl.atomic_add(arrivals + number, 1, sem="acq_rel")
        if before == SPLITS - 1:
            tl.debug_barrier()
            tl.store(arrivals + number, 0)
            products = tl.zeros([TILE, ROWS], tl.float32)
            for part in tl.static_range(SPLITS):
                from_part = partial + (part * count + number) * (TILE * ROWS) + inner
                products += tl.load(from_part, cache_modifier=".cg")
            _finish(
                products, scale, shift, added, gains, out, scaled, sums, outputs, tile, member, real,
                ROWS, TILE, PARTS, GATED, BIAS, ADDS, NORMS,
            )  # fmt: skip
    else:
        _finish(
            products, scale, shift, added, gains, out, scaled, sums, outputs, tile, member, real,
            ROWS, TILE, PARTS, GATED, BIAS, ADDS, NORMS,
        )  # fmt: skip


@triton.jit
def _prefetch(source, left, SPAN: tl.constexpr):
    """Bring up to SPAN of the `left` numbers of every row at `source` [TILE, 1] into the L2 cache."""
    LINE: tl.constexpr = 64
    line = tl.arange(0, triton.next_power_of_2((SPAN + LINE - 1) // LINE)) * LINE
    at = source + tl.where(line < min(SPAN, left), line, 0)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _ahead(
    squares, bias, residual, gain, epsilon, outputs, tile, member, real,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """What `_finish` needs besides the products, loaded while these are on their way; zeros for what it does not."""
    HALF: tl.constexpr = TILE // 2 if GATED else TILE
    feature = tl.arange(0, TILE)
    column = tile * HALF + tl.arange(0, HALF)
    scale = tl.zeros([ROWS], tl.float32)
    if PARTS > 0:
        part = tl.arange(0, triton.next_power_of_2(PARTS))
        held = real[:, None] & (part < PARTS)[None, :]
        square = tl.sum(tl.load(squares + member[:, None] * PARTS + part[None, :], mask=held, other=0.0), 1)
        scale = tl.rsqrt(square / WIDTH + epsilon)
    shift = tl.zeros([TILE], tl.float32)
    if BIAS:
        named = tile * HALF + feature % HALF
        shift = tl.load(bias + tl.minimum(named, outputs - 1) + feature // HALF * outputs).to(tl.float32)
    added = tl.zeros([HALF, ROWS], tl.float32)
    if ADDS:
        written = real[None, :] & (column < outputs)[:, None]
        added = tl.load(residual + member[None, :] * outputs + column[:, None], mask=written, other=0.0).to(tl.float32)
    gains = tl.zeros([HALF], tl.float32)
    if NORMS:
        gains = tl.load(gain + column, mask=column < outputs, other=0.0).to(tl.float32)
    return scale, shift, added, gains


@triton.jit
def _finish(
    products, scale, shift, added, gains, out, scaled, sums, outputs, tile, member, real,
    ROWS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    ADDS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """From whole `products` [TILE, ROWS] to what is written."""
    HALF: tl.constexpr = TILE // 2 if GATED else TILE
    if PARTS > 0:
        products = products * scale[None, :]
    if BIAS:
        products += shift[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(products, (2, HALF, ROWS)), (1, 2, 0)))
        products = gate * tl.sigmoid(gate) * up
    if ADDS:
        products += added
    column = tile * HALF + tl.arange(0, HALF)
    target = member[None, :] * outputs + column[:, None]
    written = real[None, :] & (column < outputs)[:, None]
    rounded = products.to(out.dtype.element_ty)
    tl.store(out + target, rounded, mask=written)
    if NORMS:
        value = tl.where(written, rounded.to(tl.float32), 0.0)
        tl.store(scaled + target, (value * gains[:, None]).to(scaled.dtype.element_ty), mask=written)
        tl.store(sums + member * tl.num_programs(0) + tile, tl.sum(value * value, 0), mask=real)
