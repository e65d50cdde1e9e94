"""Kernels that find out on the device which single-token rows begin with the same pages.

Each row chooses at how many tiles, a power of two, it is compared: where most is saved, counting those that have the
same page there. Rows that chose the same page are a group; the lowest leads it and the others are compared with it. A
group is cut into packs of MEMBERS rows. A pack's `reach` is how many whole tiles all its rows have in common with the
leader, each of them in front of the row's last key. Rows in no pack have depth 0.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def choose_pages(
    starts, lengths, tables, table_stride, keys, wholes, rows,
    PAGE: tl.constexpr, TILE: tl.constexpr, ROWS_PAD: tl.constexpr, LEVELS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Program row: the page that it chose and where, `keys[row]`, or -1 if that saves less than LEAST tiles.

    `wholes[row]` counts its tiles in front of the one of its last key.
    """
    row = tl.program_id(0)
    index = tl.arange(0, ROWS_PAD)
    inside = index < rows
    begins = tl.load(starts + index, mask=inside, other=0)
    length = tl.load(lengths + index, mask=inside, other=0)
    length = tl.where(tl.load(starts + index + 1, mask=inside, other=0) - begins == 1, length, 0)
    whole = tl.maximum(length - 1, 0) // TILE
    most, key = LEAST, -1
    for level in range(LEVELS):
        tiles = 1 << level
        column = tables + index.to(tl.int64) * table_stride + (tiles * TILE - 1) // PAGE
        page = tl.load(column, mask=inside & (whole >= tiles), other=-1)
        mine = tl.sum(tl.where(index == row, page, 0), 0)
        saved = tl.sum(((page == mine) & (page >= 0) & (index != row)).to(tl.int32), 0) * tiles
        key = tl.where(saved >= most, mine * LEVELS + level, key)
        most = tl.maximum(saved, most)
    tl.store(keys + row, key)
    tl.store(wholes + row, tl.sum(tl.where(index == row, whole, 0), 0))


@triton.jit(do_not_specialize=["rows"])
def find_prefixes(
    keys, wholes, tables, table_stride, leaders, ranks, counts, depths, rows,
    PAGE: tl.constexpr, TILE: tl.constexpr, ROWS_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program row: its group's leader, its rank in it, how many they are (0 if it is alone) and what it shares."""
    row = tl.program_id(0)
    index = tl.arange(0, ROWS_PAD)
    key = tl.load(keys + index, mask=index < rows, other=-1)
    alike = (key == tl.sum(tl.where(index == row, key, 0), 0)) & (key >= 0)
    leader = tl.min(tl.where(alike, index, ROWS_PAD), 0)
    other = tl.min(tl.where(alike & (index != row), index, ROWS_PAD), 0)
    count = tl.where(other < ROWS_PAD, tl.sum(alike.to(tl.int32), 0), 0)
    limit = tl.minimum(tl.load(wholes + row), tl.load(wholes + other, mask=count > 0, other=0))
    number = tl.cdiv(limit * TILE, PAGE)
    mine, others = tables + row.to(tl.int64) * table_stride, tables + other.to(tl.int64) * table_stride
    agree = number
    for chunk in range(0, number, CHUNK):
        at = chunk + tl.arange(0, CHUNK)
        differs = tl.load(mine + at, mask=at < number, other=0) != tl.load(others + at, mask=at < number, other=0)
        agree = tl.minimum(agree, tl.min(tl.where(differs, at, number), 0))
    tl.store(leaders + row, leader)
    tl.store(ranks + row, tl.sum((alike & (index < row)).to(tl.int32), 0))
    tl.store(counts + row, count)
    tl.store(depths + row, tl.minimum(limit, agree * PAGE // TILE))


@triton.jit(do_not_specialize=["rows"])
def list_packs(
    leaders, ranks, counts, depths, bases, members, heads, reaches, ends, arrivals, rows,
    HEADS: tl.constexpr, ROWS_PAD: tl.constexpr, MEMBERS: tl.constexpr, PACKS: tl.constexpr, SHARES: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """One program: the packs, and how they are cut into parts of `ends[PACKS]` tiles.

    `members` [PACKS, MEMBERS] are rows or -1, `heads` the leaders, `reaches` the packs' tiles, `ends` count the parts
    of all packs up to each. `depths` [rows] become those of the packs. Also clears `arrivals` [PACKS, HEADS].
    """
    index, pack = tl.arange(0, ROWS_PAD), tl.arange(0, PACKS)
    for i in range(MEMBERS):
        tl.store(members + pack * MEMBERS + i, pack * 0 - 1)
    for i in range(HEADS):
        tl.store(arrivals + pack * HEADS + i, pack * 0)
    NONE: tl.constexpr = 1 << 30
    tl.store(reaches + pack, pack * 0 + NONE)
    count = tl.load(counts + index, mask=index < rows, other=0)
    leader, rank = tl.load(leaders + index, mask=count > 0, other=0), tl.load(ranks + index, mask=count > 0, other=0)
    number = tl.where((leader == index) & (count > 0), tl.cdiv(count, MEMBERS), 0)
    tl.store(bases + index, tl.cumsum(number, 0) - number, mask=index < rows)
    tl.debug_barrier()
    mine = tl.load(bases + leader, mask=count > 0, other=PACKS) + rank // MEMBERS
    depth = tl.load(depths + index, mask=mine < PACKS, other=0)
    tl.store(members + mine * MEMBERS + rank % MEMBERS, index, mask=depth > 0)
    tl.store(heads + mine, leader, mask=depth > 0)
    tl.atomic_min(reaches + mine, depth, mask=depth > 0)
    tl.debug_barrier()
    tl.store(depths + index, tl.load(reaches + mine, mask=depth > 0, other=0), mask=index < rows)
    reach = tl.load(reaches + pack)
    reach = tl.where(reach == NONE, 0, reach)
    size = tl.maximum(LEAST, tl.cdiv(tl.sum(reach, 0), SHARES))
    if tl.sum(tl.cdiv(reach, size), 0) > SHARES:  # no share should have two parts if that can be helped
        others = tl.maximum(SHARES - tl.sum((reach > 0).to(tl.int32), 0), (SHARES + 1) // 2)
        size = tl.maximum(LEAST, tl.cdiv(tl.sum(reach, 0), others))
    tl.store(ends + pack, tl.cumsum(tl.cdiv(reach, size), 0))
    tl.store(ends + PACKS, size)
