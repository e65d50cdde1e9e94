"""Scores of a tile of keys for `decode_hopper`, and copies in float16 of keys and values that are stored in e4m3."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from llmkit_attention.flash.combine_hopper import WARPS


@gluon.jit
def scores(
    keys, values, wide_keys, wide_values, packed, context, zeros, lowest, seen, scale, softcap,
    TILE: gl.constexpr, DIM: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Logits in base 2 [TILE, queries], -inf for keys that are not seen, and `context`, which may have been on its way.

    Behind it the values can be multiplied: `values` with zeros for keys that are not seen, or, where they are stored in
    8 bits, such a copy of them in `wide_values`.
    """
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [WARPS, 1], [1, 0])
    is_cut = (seen < TILE - 1) | (lowest > 0)
    if keys.dtype.primitive_bitwidth == 8:
        wide_keys.store(keys.load(WIDE).to(wide_keys.dtype))
        so_far = warpgroup_mma_wait(0, deps=[context])
        fence_async_shared()
        tl.debug_barrier()  # the last of the keys are there, and all have read the values before these
        logits = warpgroup_mma(
            wide_keys, packed.permute((1, 0)), warpgroup_mma_init(zeros), use_acc=False, is_async=True
        )
        copied = values.load(WIDE).to(wide_values.dtype)
        if is_cut:
            copied = _hide(copied, lowest, seen, TILE, WIDE)
        wide_values.store(copied)
        logits = warpgroup_mma_wait(0, deps=[logits])
    else:
        if is_cut:
            values.store(_hide(values.load(WIDE), lowest, seen, TILE, WIDE))
            fence_async_shared()
        logits = warpgroup_mma(keys, packed.permute((1, 0)), warpgroup_mma_init(zeros), use_acc=False, is_async=True)
        logits, so_far = warpgroup_mma_wait(0, deps=[logits, context])
    if SOFTCAP:
        logits = softcap * (1.0 - 2.0 / (gl.exp2(logits * scale * (2.0 * 1.4426950408889634 / softcap)) + 1.0))
        logits = logits * 1.4426950408889634
    else:
        logits = logits * (scale * 1.4426950408889634)
    key = gl.arange(0, TILE, gl.SliceLayout(1, zeros.type.layout))[:, None]
    return gl.where((key <= seen) & (key >= lowest), logits, float("-inf")), so_far


@gluon.jit
def _hide(values, lowest, seen, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Values [TILE, DIM] with zeros for keys that are not seen: a weight of 0 would not hide their NaN."""
    key = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    return gl.where(((key >= lowest) & (key <= seen))[:, None], values, 0.0)


@gluon.jit
def in_range(query, TYPE: gl.constexpr):
    """`query` in the type in which it is multiplied; of float16 it takes the range."""
    if query.dtype == TYPE:
        return query
    else:
        wide = query.to(gl.float32)
        return gl.where(wide > 65504.0, 65504.0, gl.where(wide < -65504.0, -65504.0, wide)).to(TYPE)
