"""Kernels for rows with one new token: every row's keys in equal splits, combined by log-sum-exp."""

import triton
import triton.language as tl

from llmkit_attention.flash.tiles import accumulate, offsets, page_ids, scores


@triton.jit
def attend_one(
    query, key_pool, value_pool, out, partial, lse, starts, lengths, tables, table_stride,
    query_n, query_h, query_d, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    ROWS_PAD: tl.constexpr, DIM_PAD: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, split): the head's GROUP queries over a share of the row's keys.

    With one split writes `out`, else normalized `partial` [row, head, split, DIM] and `lse` (base 2, -inf for none).
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token, length = tl.load(starts + row).to(tl.int64), tl.load(lengths + row)
    if tl.load(starts + row + 1) - token == 1:
        first = tl.maximum(length - window, 0) // TILE * TILE if WINDOW else 0
        share = tl.cdiv(tl.cdiv(length - first, TILE), SPLITS) * TILE
        begin = first + split * share
        end = tl.minimum(begin + share, length)
        member, dim = tl.arange(0, ROWS_PAD), tl.arange(0, DIM_PAD)
        real = (member < GROUP)[:, None] & (dim < DIM)[None, :]
        heads = head * GROUP + member
        packed = tl.load(
            query + token * query_n + heads[:, None] * query_h + dim[None, :] * query_d, mask=real, other=0.0
        )
        table = tables + row.to(tl.int64) * table_stride
        top = tl.full([ROWS_PAD], float("-inf"), tl.float32)
        total = tl.zeros([ROWS_PAD], tl.float32)
        context = tl.zeros([ROWS_PAD, DIM_PAD], tl.float32)
        page = page_ids(table, begin, end, PAGE, TILE)
        for start in range(begin, end, TILE):
            keys = start + tl.arange(0, TILE)
            base = offsets(page, keys, head, HEADS, PAGE, DIM)
            page = page_ids(table, start + TILE, end, PAGE, TILE)
            at, here = base[:, None] + dim[None, :], (keys < end)[:, None] & (dim < DIM)[None, :]
            tile = tl.load(key_pool + at, mask=here, other=0.0)
            visible = (keys < end) & (keys >= length - window) if WINDOW else keys < end
            logits = tl.where(visible[None, :], scores(packed, tl.trans(tile), scale, softcap, SOFTCAP), float("-inf"))
            values = tl.load(value_pool + at, mask=here, other=0.0)
            top, total, context = accumulate(logits, values, top, total, context)
        where = (token, row, heads, dim, split)
        _finish(out, partial, lse, where, top, total, context, real, member < GROUP, HEADS * GROUP, DIM, SPLITS)


@triton.jit
def _finish(
    out, partial, lse, where, top, total, context, real, members,
    QUERY_HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    token, row, heads, dim, split = where
    context = context / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLITS == 1:
        target = (token * QUERY_HEADS + heads[:, None]) * DIM + dim[None, :]
        tl.store(out + target, context.to(out.dtype.element_ty), mask=real)
    else:
        slot = (row * QUERY_HEADS + heads) * SPLITS + split
        seen = total > 0.0
        tl.store(partial + slot[:, None] * DIM + dim[None, :], context, mask=real & seen[:, None])
        tl.store(lse + slot, tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf")), mask=members)


@triton.jit
def combine(
    out, partial, lse, starts,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """Program (row, query head): the row's splits, weighed by their log-sum-exps; zeros where none saw a key."""
    row, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(starts + row).to(tl.int64)
    if tl.load(starts + row + 1) - token == 1:
        split, dim = tl.arange(0, SPLITS_PAD), tl.arange(0, DIM_PAD)
        slot = (row * HEADS + head) * SPLITS + split
        logs = tl.load(lse + slot, mask=split < SPLITS, other=float("-inf"))
        top = tl.max(logs, 0)
        seen = logs > float("-inf")
        weights = tl.where(seen, tl.exp2(logs - tl.where(top == float("-inf"), 0.0, top)), 0.0)
        total = tl.sum(weights, 0)
        here = seen[:, None] & (dim < DIM)[None, :]
        parts = tl.load(partial + slot[:, None] * DIM + dim[None, :], mask=here, other=0.0)
        context = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
        tl.store(out + (token * HEADS + head) * DIM + dim, context.to(out.dtype.element_ty), mask=dim < DIM)
