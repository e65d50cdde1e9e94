"""Kernels for rows with one new token: all rows' keys as one list of tiles, cut into equal shares (stream-K).

`list_tiles` writes the list once a step. Tile t belongs to row `owners[t]`. `codes[t]` = token << 14 | lowest << 8
| (count - 1) << 2 | first << 1 | last: the row's query, the range of the tile's keys that it sees, and whether the
row's tiles begin or end here. `pages[t, i]` are the pages of its keys, or where it lies in a larger page, as
page * (PAGE / TILE) + place. `ends[row]` counts the tiles of all rows up to `row`.
"""

import triton
import triton.language as tl

from llmkit_attention.flash.tiles import accumulate, factor, scores


@triton.jit(do_not_specialize=["rows"])
def list_tiles(
    starts, lengths, tables, table_stride, depths, owners, codes, pages, ends, arrivals, rows, window,
    HEADS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, ROWS_PAD: tl.constexpr, CHUNK: tl.constexpr,
    WINDOW: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Program row: its tiles behind those of the rows before it; also clears its `arrivals` [row, HEADS].

    With SHARED the first `depths[row]` tiles are left out: others read them for the row.
    """
    row = tl.program_id(0)
    index = tl.arange(0, ROWS_PAD)
    inside = index < rows
    length = tl.load(lengths + index, mask=inside, other=0)
    begins = tl.load(starts + index, mask=inside, other=0)
    length = tl.where(tl.load(starts + index + 1, mask=inside, other=0) - begins == 1, length, 0)
    lowest = tl.maximum(length - window, 0) if WINDOW else length * 0
    if SHARED:
        lowest = tl.load(depths + index, mask=inside, other=0) * TILE
    count = tl.cdiv(length, TILE) - lowest // TILE
    base = tl.sum(tl.where(index < row, count, 0), 0)
    number = tl.sum(tl.where(index == row, count, 0), 0)
    length = tl.sum(tl.where(index == row, length, 0), 0)
    lowest = tl.sum(tl.where(index == row, lowest, 0), 0)
    token = tl.sum(tl.where(index == row, begins, 0), 0)
    tl.store(ends + row, base + number)
    head = tl.arange(0, triton.next_power_of_2(HEADS))
    tl.store(arrivals + row * HEADS + head, head * 0, mask=head < HEADS)
    table = tables + row.to(tl.int64) * table_stride
    PAGES: tl.constexpr = TILE // PAGE if TILE > PAGE else 1
    for chunk in range(0, number, CHUNK):
        tile = chunk + tl.arange(0, CHUNK)
        real = tile < number
        key = (lowest // TILE + tile) * TILE
        seen = tl.minimum(length - key, TILE)
        code = (token << 14) | (tl.maximum(lowest - key, 0) << 8) | ((seen - 1) << 2)
        code |= tl.where(tile == 0, 2, 0) | tl.where(tile == number - 1, 1, 0)
        tl.store(codes + base + tile, code, mask=real)
        tl.store(owners + base + tile, row + 0 * tile, mask=real)
        for i in tl.static_range(PAGES):
            held = real & (key + i * PAGE < length)
            page = tl.load(table + (key + i * PAGE) // PAGE, mask=held, other=0)
            if TILE < PAGE:
                page = page * (PAGE // TILE) + key % PAGE // TILE
            tl.store(pages + (base + tile) * PAGES + i, page, mask=real)


@triton.jit(do_not_specialize=["rows"])
def attend_one(
    query, key_pool, value_pool, out, own, partial, lse, starts, owners, codes, pages, ends, arrivals, rows,
    query_n, query_h, query_d, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    ROWS_PAD: tl.constexpr, DIM_PAD: tl.constexpr, SHARES: tl.constexpr, LEAST: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (share, KV head): its share of the tiles, for the head's GROUP queries.

    A row that lies within one share is written to `out`. Of the others a share holds at most two, its first and its
    last: their normalised parts go to `partial` [share, head, 2, ROWS_PAD, DIM] and `lse` (base 2), and the share that
    arrives last at a row combines its parts. With SHARED a row's log-sum-exps go to `own` [N, query heads].
    """
    share, head = tl.program_id(0), tl.program_id(1)
    # What `list_tiles` wrote is complete before any kernel of a layer starts, so it is read before the wait.
    total = tl.load(ends + rows - 1)
    size = tl.maximum(tl.cdiv(total, SHARES), LEAST)
    begin = share * size
    end = tl.minimum(begin + size, total)
    member, dim, offset = tl.arange(0, ROWS_PAD), tl.arange(0, DIM_PAD), tl.arange(0, TILE)
    inside = (dim < DIM)[None, :]
    real = (member < GROUP)[:, None] & inside
    heads = head * GROUP + member
    place = heads[:, None] * query_h + dim[None, :] * query_d
    if begin < end:
        code = tl.load(codes + begin)
        page = _pages(pages, begin, PAGE, TILE)
        opening, closing = tl.load(owners + begin), tl.load(owners + end - 1)
        first, last = _tiles_of(ends, opening)
        other_first, other_last = _tiles_of(ends, closing)
        if PDL:
            tl.extra.cuda.gdc_wait()
        top = tl.full([ROWS_PAD], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS_PAD], tl.float32)
        context = tl.zeros([ROWS_PAD, DIM_PAD], tl.float32)
        coming = tl.load(query + (code >> 14).to(tl.int64) * query_n + place, mask=real, other=0.0)
        slot, begins = 0, (code & 2) != 0
        for tile in range(begin, end):
            now, token = code, (code >> 14).to(tl.int64)
            at = _keys(page, head, offset, HEADS, PAGE, TILE)[:, None] * DIM + dim[None, :]
            ahead = tl.minimum(tile + 1, end - 1)
            code = tl.load(codes + ahead)
            page = _pages(pages, ahead, PAGE, TILE)
            seen = offset <= ((now >> 2) & 63)
            packed = factor(coming, key_pool)
            coming = tl.load(query + (code >> 14).to(tl.int64) * query_n + place, mask=real, other=0.0)
            stored = tl.load(key_pool + at, mask=seen[:, None] & inside, other=0.0)
            visible = seen & (offset >= ((now >> 8) & 63)) if WINDOW else seen
            logits = scores(packed, tl.trans(stored), scale, softcap, SOFTCAP)
            logits = tl.where(visible[None, :], logits, float("-inf"))
            # Keys before the window may be anybody's: a weight of 0 would not hide their NaN.
            values = tl.load(value_pool + at, mask=visible[:, None] & inside, other=0.0)
            top, weight, context = accumulate(logits, values.to(packed.dtype), top, weight, context)
            is_last = (now & 1) != 0
            if is_last | (tile == end - 1):
                part = ((share * HEADS + head) * 2 + slot) * ROWS_PAD + member
                log = top + tl.log2(weight)
                is_whole = begins & is_last
                result = context / weight[:, None]
                _put(out, partial, lse, token, heads, part, dim, result, log, is_whole, real, HEADS * GROUP, DIM)
                if SHARED:
                    tl.store(own + token * (HEADS * GROUP) + heads, log, mask=(member < GROUP) & is_whole)
                top = tl.full([ROWS_PAD], float("-inf"), tl.float32)
                weight = tl.zeros([ROWS_PAD], tl.float32)
                context = tl.zeros([ROWS_PAD, DIM_PAD], tl.float32)
                slot, begins = 1, True
        if PDL:  # not sooner: programs of the next kernel that wait here would crowd out some of this one's
            tl.extra.cuda.gdc_launch_dependents()
        tl.debug_barrier()
        for item in range(tl.where(closing == opening, 1, 2)):
            if (first < begin) | (last >= end):
                row = tl.where(item == 0, opening, closing)
                _hand_over(
                    out, own, partial, lse, starts, arrivals, row, first, last, size, head,
                    HEADS, GROUP, DIM, ROWS_PAD, DIM_PAD, SHARED,
                )  # fmt: skip
            first, last = other_first, other_last
    elif PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _put(
    out, partial, lse, token, heads, part, dim, context, log, is_whole, real,
    QUERY_HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write a whole row's result to `out`, or a part of one."""
    target = (token * QUERY_HEADS + heads[:, None]) * DIM + dim[None, :]
    tl.store(out + target, context.to(out.dtype.element_ty), mask=real & is_whole)
    tl.store(partial + part[:, None] * DIM + dim[None, :], context, mask=real & (not is_whole))
    tl.store(lse + part, log, mask=not is_whole)


@triton.jit
def _hand_over(
    out, own, partial, lse, starts, arrivals, row, first, last, size, head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """A share has written its part of a row that goes from tile `first` to `last`; if it was the last, combine all."""
    first_share, last_share = first // size, last // size
    before = tl.atomic_add(arrivals + row * HEADS + head, 1, sem="acq_rel")
    if before == last_share - first_share:
        tl.debug_barrier()
        tl.store(arrivals + row * HEADS + head, 0)
        begins_inside = (first > first_share * size).to(tl.int32)
        token = tl.load(starts + row).to(tl.int64)
        _combine(
            out, own, partial, lse, token, first_share, last_share, begins_inside, head,
            HEADS, GROUP, DIM, ROWS_PAD, DIM_PAD, SHARED,
        )  # fmt: skip


@triton.jit
def _tiles_of(ends, row):
    """A row's first and last tile."""
    return tl.load(ends + row - 1, mask=row > 0, other=0), tl.load(ends + row) - 1


@triton.jit
def _keys(page, head, offset, HEADS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Where a tile's keys lie in a pool [pages, HEADS, PAGE], int64 [TILE]."""
    if TILE < PAGE:
        return (page // (PAGE // TILE) * HEADS + head) * PAGE + page % (PAGE // TILE) * TILE + offset
    else:
        return (page * HEADS + head) * PAGE + offset % PAGE


@triton.jit
def _pages(pages, tile, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Pages of a tile's keys: one number if a page holds the tile, else one a key, int64."""
    if TILE <= PAGE:
        return tl.load(pages + tile).to(tl.int64)
    else:
        return tl.load(pages + tile * (TILE // PAGE) + tl.arange(0, TILE) // PAGE).to(tl.int64)


@triton.jit
def _combine(
    out, own, partial, lse, token, first_share, last_share, begins_inside, head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Write a row's parts weighed by their log-sum-exps.

    A share holds its part in slot 0, but the first share in slot 1 if the row begins inside it.
    """
    MEMBERS: tl.constexpr = triton.next_power_of_2(GROUP)
    PARTS: tl.constexpr = max(1, 4096 // (MEMBERS * DIM_PAD))
    member, dim = tl.arange(0, MEMBERS), tl.arange(0, DIM_PAD)
    top = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    context = tl.zeros([MEMBERS, DIM_PAD], tl.float32)
    for chunk in range(first_share, last_share + 1, PARTS):
        share = chunk + tl.arange(0, PARTS)
        part = (share * HEADS + head) * 2 + tl.where(share == first_share, begins_inside, 0)
        row = part[:, None] * ROWS_PAD + member[None, :]
        held = (share <= last_share)[:, None] & (member < GROUP)[None, :]
        logs = tl.load(lse + row, mask=held, other=float("-inf"), cache_modifier=".cg")
        real = held[:, :, None] & (dim < DIM)[None, None, :]
        at = row[:, :, None] * DIM + dim[None, None, :]
        values = tl.load(partial + at, mask=real, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(logs, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, decay = tl.exp2(logs - base[None, :]), tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 0)
        context = context * decay[:, None] + tl.sum(values * weights[:, :, None], 0)
        top = new_top
    if SHARED:
        tl.store(own + token * (HEADS * GROUP) + head * GROUP + member, top + tl.log2(total), mask=member < GROUP)
    context = context / tl.where(total == 0.0, 1.0, total)[:, None]
    target = (token * (HEADS * GROUP) + head * GROUP + member[:, None]) * DIM + dim[None, :]
    tl.store(out + target, context.to(out.dtype.element_ty), mask=(member < GROUP)[:, None] & (dim < DIM)[None, :])
