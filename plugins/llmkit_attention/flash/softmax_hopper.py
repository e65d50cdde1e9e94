"""The running softmax of `prefill_hopper`: what four warps do with a tile of keys while the next one is multiplied."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

QUERIES = gl.constexpr(64)
"""New tokens that a warpgroup takes: what one wgmma multiplies."""
HALF, TILE = gl.constexpr(64), gl.constexpr(128)
"""Keys of half a tile, which one page holds, and of a tile."""


@gluon.jit
def advance(
    query, keys, values, keys_full, keys_free, values_full, values_free, step, base, lowest, window, factor, softcap,
    bend, top, sums, context, weights, masked,
    KEYS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Multiply with the keys of the next tile and with the values of the one before, and take the softmax further.

    `base` is the place of the first of the tile's KEYS keys: TILE, or the upper HALF. `weights` [QUERIES, TILE] belong
    to stage `step` of the ring; returned are those of `step + 1`, [QUERIES, KEYS].
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    CONTEXT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    old, old_phase = step % STAGES, (step // STAGES) & 1
    step += 1
    stage, phase = step % STAGES, (step // STAGES) & 1
    mbarrier.wait(keys_full.index(stage), phase)
    logits = _scores(query, keys.index(stage), KEYS)
    mbarrier.wait(values_full.index(old), old_phase)
    context = warpgroup_mma(weights, values.index(old), context, is_async=True)
    logits = warpgroup_mma_wait(1, deps=[logits])
    tl.debug_barrier()  # all four warps have read the keys
    mbarrier.arrive(keys_free.index(stage))
    logits = capped(logits, softcap, bend, SOFTCAP)
    if WINDOW:  # noqa: SIM102 - the compiler drops only what a constant alone decides
        if masked:
            logits = hide(logits, base, lowest, window, WINDOW, KEYS)
    top = gl.convert_layout(top, ROWS)
    new_top = gl.maximum(top, gl.max(logits, 1))
    fresh = gl.exp2(logits * factor - (new_top * factor)[:, None])
    decay = gl.exp2((top - new_top) * factor)
    sums = gl.convert_layout(sums, ROWS) * decay + gl.sum(fresh, 1)
    fresh = gl.convert_layout(fresh.to(query.dtype), gl.DotOperandLayout(0, CONTEXT, 2))
    # Passes at once. But nothing above may sink below it, nor what is below rise: without it, ptxas waits for the
    # product before the softmax, which then no longer runs beside it.
    mbarrier.wait(values_full.index(old), old_phase)
    context, weights, fresh, sums, decay = warpgroup_mma_wait(0, deps=[context, weights, fresh, sums, decay])
    tl.debug_barrier()
    mbarrier.arrive(values_free.index(old))
    context = context * gl.convert_layout(decay, gl.SliceLayout(1, CONTEXT))[:, None]
    return step, new_top, sums, context, fresh


@gluon.jit
def open_tile(
    query, keys, keys_full, keys_free, step, base, lowest, window, factor, softcap, bend,
    DIM: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """The first tile of all, with the newest keys, of which queries see unlike many: (top, sums, weights)."""
    CONTEXT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    stage, phase = step % STAGES, (step // STAGES) & 1
    mbarrier.wait(keys_full.index(stage), phase)
    logits = warpgroup_mma_wait(0, deps=[_scores(query, keys.index(stage), TILE)])
    tl.debug_barrier()
    mbarrier.arrive(keys_free.index(stage))
    logits = hide(capped(logits, softcap, bend, SOFTCAP), base, lowest, window, WINDOW, TILE)
    top = gl.max(logits, 1)
    weights = gl.exp2(logits * factor - (top * factor)[:, None])
    sums = gl.sum(weights, 1)
    return top, sums, gl.convert_layout(weights.to(query.dtype), gl.DotOperandLayout(0, CONTEXT, 2))


@gluon.jit
def close(values, values_full, values_free, step, context, weights, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """Multiply with the values of the last tile of all, of which KEYS count."""
    stage, phase = step % STAGES, (step // STAGES) & 1
    mbarrier.wait(values_full.index(stage), phase)
    context = warpgroup_mma(weights, _upper(values.index(stage), KEYS), context, is_async=True)
    context, weights = warpgroup_mma_wait(0, deps=[context, weights])
    tl.debug_barrier()
    mbarrier.arrive(values_free.index(stage))
    return context


@gluon.jit
def _scores(query, keys, KEYS: gl.constexpr):
    """Starts the product [QUERIES, KEYS]."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    zeros = gl.zeros([QUERIES, KEYS], gl.float32, SCORES)
    return warpgroup_mma(query, _upper(keys, KEYS).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _upper(tile, KEYS: gl.constexpr):
    """The upper KEYS rows of a tile [TILE, DIM]."""
    if KEYS == TILE:
        return tile
    else:
        return tile.slice(TILE - KEYS, KEYS, 0)


@gluon.jit
def capped(logits, softcap, bend, SOFTCAP: gl.constexpr):
    """`softcap` * tanh(scaled logits), for `bend` = 2 * scale * log2(e) / softcap; or the logits as they are."""
    if SOFTCAP:
        return softcap * (1.0 - 2.0 / (gl.exp2(logits * bend) + 1.0))
    else:
        return logits


@gluon.jit
def hide(logits, base, lowest, window, WINDOW: gl.constexpr, KEYS: gl.constexpr):
    """-inf where query `lowest` + i does not see key `base` + j."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    key = base + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    place = lowest + gl.arange(0, QUERIES, gl.SliceLayout(1, SCORES))
    seen = (key[None, :] <= place[:, None]) & (key >= 0)[None, :]
    if WINDOW:
        seen = seen & (key[None, :] > place[:, None] - window)
    return gl.where(seen, logits, float("-inf"))
