"""Kernel for rows with several new tokens: tiles of queries over the row's pages, causal from each query's place."""

import triton
import triton.language as tl

from llmkit_attention.flash.tiles import accumulate, factor, offsets, page_ids, scores


@triton.jit(do_not_specialize=["rows", "most"])
def list_queries(
    starts, tiles, rows, most, QUERIES: tl.constexpr, ROWS_PAD: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Program row: (row, first new token) of its tiles, the last ones first, behind those of the rows before it.

    Rows with one new token have none. The last program fills up to `most` with row -1.
    """
    row, index = tl.program_id(0), tl.arange(0, ROWS_PAD)
    inside = index < rows
    count = tl.load(starts + index + 1, mask=inside, other=0) - tl.load(starts + index, mask=inside, other=0)
    count = tl.where(count > 1, tl.cdiv(count, QUERIES), 0)
    base = tl.sum(tl.where(index < row, count, 0), 0)
    number = tl.sum(tl.where(index == row, count, 0), 0)
    for chunk in range(0, number, CHUNK):
        tile = chunk + tl.arange(0, CHUNK)
        tl.store(tiles + 2 * (base + tile), row + 0 * tile, mask=tile < number)
        tl.store(tiles + 2 * (base + tile) + 1, (number - 1 - tile) * QUERIES, mask=tile < number)
    if row == rows - 1:
        for chunk in range(base + number, most, CHUNK):
            tile = chunk + tl.arange(0, CHUNK)
            tl.store(tiles + 2 * tile, 0 * tile - 1, mask=tile < most)


@triton.jit
def attend_many(
    query, key_pool, value_pool, key_tiles, value_tiles, out, tiles, starts, lengths, tables, table_stride,
    query_n, query_h, query_d, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    QUERIES: tl.constexpr, DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Program (query head, tile): `tiles` int32 [tiles, 2] names a row and the first of QUERIES of its new tokens.

    Tiles of keys that every query sees come first, without masks; with BULK through the descriptors `key_tiles` and
    `value_tiles` of the pools seen as [pages * HEADS * PAGE, DIM]. Those that need a mask follow.
    """
    head, tile = tl.program_id(0), tl.program_id(1)
    row, offset = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    if row < 0:
        return
    start, length = tl.load(starts + row), tl.load(lengths + row)
    count = tl.load(starts + row + 1) - start
    index, dim = offset + tl.arange(0, QUERIES), tl.arange(0, DIM_PAD)
    token, position = (start + index).to(tl.int64), length - count + index
    real = (index < count)[:, None] & (dim < DIM)[None, :]
    block = tl.load(query + token[:, None] * query_n + head * query_h + dim[None, :] * query_d, mask=real, other=0.0)
    block, lowest = factor(block, key_pool), length - count + offset
    begin = tl.maximum(lowest - window + 1, 0) // TILE * TILE if WINDOW else 0
    middle = begin if WINDOW else (lowest + 1) // TILE * TILE
    end = tl.minimum(lowest + QUERIES, length)
    table = tables + row.to(tl.int64) * table_stride
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    context = tl.zeros([QUERIES, DIM_PAD], tl.float32)
    kv_head, inside = head // GROUP, (dim < DIM)[None, :]
    page = page_ids(table, begin, end, PAGE, TILE)
    for first in range(begin, middle, TILE):
        base = offsets(page, first + tl.arange(0, TILE), kv_head, HEADS, PAGE, DIM)
        place = ((page * HEADS + kv_head) * PAGE + first % PAGE).to(tl.int32) if BULK else 0
        page = page_ids(table, first + TILE, end, PAGE, TILE)
        if BULK:
            stored, values = key_tiles.load([place, 0]), value_tiles.load([place, 0])
        else:
            stored = tl.load(key_pool + base[:, None] + dim[None, :], mask=inside, other=0.0)
            values = tl.load(value_pool + base[:, None] + dim[None, :], mask=inside, other=0.0)
        logits = scores(block, tl.trans(stored), scale, softcap, SOFTCAP)
        top, total, context = accumulate(logits, values.to(block.dtype), top, total, context)
    for first in range(middle, end, TILE):
        keys = first + tl.arange(0, TILE)
        base = offsets(page, keys, kv_head, HEADS, PAGE, DIM)
        page = page_ids(table, first + TILE, end, PAGE, TILE)
        here = (keys < end)[:, None] & inside
        if WINDOW:  # what no query sees may be anybody's: a weight of 0 would not hide its NaN
            here &= (keys > lowest - window)[:, None]
        stored = tl.load(key_pool + base[:, None] + dim[None, :], mask=here, other=0.0)
        logits = scores(block, tl.trans(stored), scale, softcap, SOFTCAP)
        visible = keys[None, :] <= position[:, None]
        if WINDOW:
            visible &= keys[None, :] > position[:, None] - window
        values = tl.load(value_pool + base[:, None] + dim[None, :], mask=here, other=0.0)
        logits = tl.where(visible, logits, float("-inf"))
        top, total, context = accumulate(logits, values.to(block.dtype), top, total, context)
    context = context / tl.where(total == 0.0, 1.0, total)[:, None]
    target = (token[:, None] * (HEADS * GROUP) + head) * DIM + dim[None, :]
    tl.store(out + target, context.to(out.dtype.element_ty), mask=real)
