"""What decode and prefill kernels share: where a tile of keys lies, its scores, and the running softmax.

Keys and values in e4m3 are multiplied as float16, which holds every such number and takes one instruction to get to;
but as the model computes where queries are so wide that they would not leave registers enough.
"""

import triton
import triton.language as tl


@triton.jit
def page_ids(table, first, length, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Pages of keys `first` to `first + TILE`: one number if a page holds the tile, else one a key.

    A tile that starts at or behind `length` has page 0, and nothing is read for it.
    """
    if TILE <= PAGE:
        return tl.load(table + first // PAGE, mask=first < length, other=0).to(tl.int64)
    else:
        keys = first + tl.arange(0, TILE)
        return tl.load(table + keys // PAGE, mask=keys < length, other=0).to(tl.int64)


@triton.jit
def offsets(
    page, keys, head, HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Where the rows of a tile begin in a pool [pages, HEADS, PAGE, DIM], int64 [TILE]."""
    return ((page * HEADS + head) * PAGE + keys % PAGE) * DIM


@triton.jit
def factor(query, pool):
    """`query` [M, D] in the type in which it is multiplied with what is stored in `pool`."""
    if pool.dtype.element_ty == tl.float8e4nv and query.shape[1] <= 128:
        wide = query.to(tl.float32)
        return tl.where(wide > 65504.0, 65504.0, tl.where(wide < -65504.0, -65504.0, wide)).to(tl.float16)
    else:
        return query


@triton.jit
def scores(query, keys, scale, softcap, SOFTCAP: tl.constexpr):
    """Scaled and capped logits in base 2: `query` [M, D], `keys` [D, TILE] -> float32 [M, TILE]."""
    keys = keys.to(query.dtype)
    if SOFTCAP:
        logits = tl.dot(query, keys) * scale
        logits = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * 1.4426950408889634 / softcap)) + 1.0))
        return logits * 1.4426950408889634
    else:
        return tl.dot(query, keys) * (scale * 1.4426950408889634)


@triton.jit
def accumulate(logits, values, top, total, context):
    """One tile further in the running softmax; rows that have seen no key yet keep a top of -inf."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    decay = tl.exp2(top - base)
    context = tl.dot(weights.to(values.dtype), values, context * decay[:, None])
    return new_top, total * decay + tl.sum(weights, 1), context
