"""Prefill kernel for Hopper: what `prefill.attend_many` does, for two query heads of a KV head at a time.

One program a multiprocessor goes through the list of `prefill_list`. A warp of its own brings queries, keys and values
into shared memory by bulk copies (TMA), as far ahead as there is room, across the ends of tiles too. Two warpgroups
multiply, each for a query head of the pair, so that both read what was brought once; the softmax of a tile runs beside
the product with the values of the tile before.
"""

# mypy: disable-error-code="no-redef,no-untyped-def,untyped-decorator"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from llmkit_attention.flash.decode_hopper import SWIZZLED
from llmkit_attention.flash.softmax_hopper import HALF, QUERIES, TILE, advance, close, open_tile

PANEL = gl.constexpr(64)
"""16-bit numbers of a key or value that one bulk copy takes: what a row of swizzled shared memory holds."""
OUTSIDE = gl.constexpr(0x7FFFFF00)
"""A row behind every pool's end: what is copied from there is zeros."""


@gluon.jit(do_not_specialize=["most", "table_stride", "window"])
def attend_many_hopper(
    queries, key_tiles, value_tiles, out, tiles, most, tables, table_stride, scale, softcap, window,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr, HELD: gl.constexpr, REGISTERS: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Grid [PROGRAMS]; fills `out` [N, HEADS * GROUP, DIM] for `tiles` int32 [most + 1, 4] of `list_longest_first`.

    `queries` is a descriptor of [N, HEADS * GROUP * DIM] with boxes [QUERIES, DIM]; `key_tiles` and `value_tiles` are
    of the pools as [pages * HEADS * PAGE, DIM] with boxes [HALF, PANEL]. STAGES tiles of keys and of values and HELD
    pairs of query tiles have room; a multiplying thread has REGISTERS. GROUP is even, PAGE a multiple of HALF.
    """
    TYPE: gl.constexpr = key_tiles.dtype
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    query = gl.allocate_shared_memory(TYPE, [2 * HELD, QUERIES, DIM], SWIZZLED)
    keys = gl.allocate_shared_memory(TYPE, [STAGES, TILE, DIM], SWIZZLED)
    values = gl.allocate_shared_memory(TYPE, [STAGES, TILE, DIM], SWIZZLED)
    query_full = gl.allocate_shared_memory(gl.int64, [HELD, 1], BAR)
    query_free = gl.allocate_shared_memory(gl.int64, [HELD, 1], BAR)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for slot in gl.static_range(HELD):
        mbarrier.init(query_full.index(slot), count=1)
        mbarrier.init(query_free.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(keys_free.index(stage), count=2)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(values_free.index(stage), count=2)
    fence_async_shared()
    total = gl.load(tiles + 4 * most) * (HEADS * GROUP // 2)
    gl.warp_specialize([
        (_attend, (
            0, query, keys, values, query_full, query_free, keys_full, keys_free, values_full, values_free,
            out, tiles, total, scale, softcap, window, HEADS, GROUP, DIM, STAGES, HELD, PROGRAMS, WINDOW, SOFTCAP,
        )),
        (_attend, (
            1, query, keys, values, query_full, query_free, keys_full, keys_free, values_full, values_free,
            out, tiles, total, scale, softcap, window, HEADS, GROUP, DIM, STAGES, HELD, PROGRAMS, WINDOW, SOFTCAP,
        )),
        (_bring, (
            queries, key_tiles, value_tiles, query, keys, values, query_full, query_free, keys_full, keys_free,
            values_full, values_free, tiles, total, tables, table_stride, window,
            HEADS, GROUP, DIM, PAGE, STAGES, HELD, PROGRAMS, WINDOW,
        )),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


@gluon.jit
def _bring(
    queries, key_tiles, value_tiles, query, keys, values, query_full, query_free, keys_full, keys_free, values_full,
    values_free, tiles, total, tables, table_stride, window,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr, PROGRAMS: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """One warp: the queries of every item of the program, and the keys and values that they see, newest first."""
    PAIRS: gl.constexpr = HEADS * GROUP // 2
    HALVES: gl.constexpr = PAGE // HALF
    step, taken = gl.to_tensor(0), gl.to_tensor(0)
    row, token, lowest, left = _item(_number(0, PROGRAMS), total, tiles, PAIRS)
    for turn in range(gl.cdiv(total, PROGRAMS)):
        next_row, next_token, next_lowest, next_left = _item(_number(turn + 1, PROGRAMS), total, tiles, PAIRS)
        number = _number(turn, PROGRAMS)
        if number < total:
            pair = number % PAIRS
            head = pair * 2 // GROUP
            last, first, count, _ = _span(lowest, left, window, WINDOW)
            table = tables + row.to(gl.int64) * table_stride
            slot = taken % HELD
            mbarrier.wait(query_free.index(slot), ((taken // HELD) & 1) ^ 1)
            bar = query_full.index(slot)
            mbarrier.expect(bar, 2 * QUERIES * DIM * 2)
            tma.async_copy_global_to_shared(queries, [token, pair * 2 * DIM], bar, query.index(2 * slot))
            tma.async_copy_global_to_shared(queries, [token, pair * 2 * DIM + DIM], bar, query.index(2 * slot + 1))
            low_page = gl.load(table + gl.maximum(last - 1, 0) // HALVES)
            high_page = gl.load(table + last // HALVES)
            for tile in range(count):
                high = last - 2 * tile
                low = high - 1
                low_place = (low_page * HEADS + head) * PAGE + low % HALVES * HALF
                low_place = gl.where(low < first, OUTSIDE, low_place)  # may be anybody's: NaN times 0 is no 0
                high_place = (high_page * HEADS + head) * PAGE + high % HALVES * HALF
                low_page = gl.load(table + gl.maximum(low - 2, 0) // HALVES)
                high_page = gl.load(table + gl.maximum(high - 2, 0) // HALVES)
                stage, phase = step % STAGES, ((step // STAGES) & 1) ^ 1
                mbarrier.wait(keys_free.index(stage), phase)
                _copy(key_tiles, keys.index(stage), keys_full.index(stage), low_place, high_place, DIM)
                mbarrier.wait(values_free.index(stage), phase)
                _copy(value_tiles, values.index(stage), values_full.index(stage), low_place, high_place, DIM)
                step += 1
            taken += 1
        row, token, lowest, left = next_row, next_token, next_lowest, next_left


@gluon.jit
def _copy(source, tile, bar, low_place, high_place, DIM: gl.constexpr):
    """Both halves of a tile [TILE, DIM], from rows `low_place` and `high_place` of a pool."""
    PANELS: gl.constexpr = DIM // PANEL
    halves = tile._reinterpret(tile.dtype, [2 * PANELS, HALF, PANEL], SWIZZLED)
    mbarrier.expect(bar, TILE * DIM * 2)
    for panel in gl.static_range(PANELS):
        tma.async_copy_global_to_shared(source, [low_place, panel * PANEL], bar, halves.index(2 * panel))
        tma.async_copy_global_to_shared(source, [high_place, panel * PANEL], bar, halves.index(2 * panel + 1))


@gluon.jit
def _attend(
    MEMBER: gl.constexpr, query, keys, values, query_full, query_free, keys_full, keys_free, values_full, values_free,
    out, tiles, total, scale, softcap, window,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr,
    PROGRAMS: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Four warps: attention of query head MEMBER of the pair of every item of the program."""
    PAIRS: gl.constexpr = HEADS * GROUP // 2
    CONTEXT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    SUMS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16]))
    factor = scale * 1.4426950408889634
    bend = factor * 2.0 / softcap
    if SOFTCAP:
        factor = gl.to_tensor(1.4426950408889634)
    step, taken = gl.to_tensor(0), gl.to_tensor(0)
    _row, token, lowest, left = _item(_number(0, PROGRAMS), total, tiles, PAIRS)
    for turn in range(gl.cdiv(total, PROGRAMS)):
        _next_row, next_token, next_lowest, next_left = _item(_number(turn + 1, PROGRAMS), total, tiles, PAIRS)
        number = _number(turn, PROGRAMS)
        if number < total:
            last, first, count, unmasked = _span(lowest, left, window, WINDOW)
            slot, base = taken % HELD, (last - 1) * HALF
            mine = query.index(2 * slot + MEMBER)
            mbarrier.wait(query_full.index(slot), (taken // HELD) & 1)
            top, sums, weights = open_tile(
                mine, keys, keys_full, keys_free, step, base, lowest, window, factor, softcap, bend,
                DIM, STAGES, WINDOW, SOFTCAP,
            )  # fmt: skip
            context = gl.zeros([QUERIES, DIM], gl.float32, CONTEXT)
            if lowest + left < (last + 1) * HALF:
                mbarrier.wait(values_full.index(step % STAGES), (step // STAGES) & 1)
                _clear(values.index(step % STAGES), lowest + left - last * HALF)
            ends_half = (count > 1) & ((last - first) % 2 == 0)
            for tile in range(1, gl.where(ends_half, count - 1, count)):
                step, top, sums, context, weights = advance(
                    mine, keys, values, keys_full, keys_free, values_full, values_free, step, base - tile * TILE,
                    lowest, window, factor, softcap, bend, top, sums, context, weights, tile >= unmasked,
                    TILE, DIM, STAGES, WINDOW, SOFTCAP,
                )  # fmt: skip
            if ends_half:  # else half of a short row's work would be for nothing
                step, _top, half_sums, context, half_weights = advance(
                    mine, keys, values, keys_full, keys_free, values_full, values_free, step, first * HALF,
                    lowest, window, factor, softcap, bend, top, sums, context, weights, True,
                    HALF, DIM, STAGES, WINDOW, SOFTCAP,
                )  # fmt: skip
                sums = gl.convert_layout(half_sums, SUMS)
                mbarrier.arrive(query_free.index(slot))
                context = close(values, values_full, values_free, step, context, half_weights, HALF, STAGES)
            else:
                mbarrier.arrive(query_free.index(slot))
                context = close(values, values_full, values_free, step, context, weights, TILE, STAGES)
            context = context * (1.0 / gl.convert_layout(sums, gl.SliceLayout(1, CONTEXT)))[:, None]
            head = number % PAIRS * 2 + MEMBER
            _put(out, context, (token.to(gl.int64) * (HEADS * GROUP) + head) * DIM, left, HEADS * GROUP, DIM)
            step += 1
            taken += 1
        token, lowest, left = next_token, next_lowest, next_left


@gluon.jit
def _number(turn, PROGRAMS: gl.constexpr):
    """Number of the item that the program takes in a turn: there and back, as items become shorter."""
    return turn * PROGRAMS + gl.where(turn % 2 == 0, gl.program_id(0), PROGRAMS - 1 - gl.program_id(0))


@gluon.jit
def _item(number, total, tiles, PAIRS: gl.constexpr):
    """Row, first token, its place and the tokens left of an item, a tile of new tokens for a pair of heads.

    They are loaded a turn ahead. Only what was loaded may be carried to the next turn: of what is computed from it
    Triton 3.6 (loop-aware elimination of common subexpressions) uses the value of the turn before.
    """
    at, here = tiles + 4 * (number // PAIRS), number < total
    row, token = gl.load(at, mask=here, other=0), gl.load(at + 1, mask=here, other=0)
    return row, token, gl.load(at + 2, mask=here, other=0), gl.load(at + 3, mask=here, other=1)


@gluon.jit
def _span(lowest, left, window, WINDOW: gl.constexpr):
    """What an item sees: (last half tile, first one, number of tiles, number of the first tile but 0 with a mask).

    Tiles go down from the last half; where halves are odd the last tile has an upper one only.
    """
    last = (lowest + gl.minimum(left, QUERIES) - 1) // HALF
    low, first = gl.to_tensor(0), gl.to_tensor(0)
    if WINDOW:
        low = gl.maximum(lowest + QUERIES - window, 0)
        first = gl.maximum(lowest - window + 1, 0) // HALF
    count = (last - first) // 2 + 1
    unmasked = gl.maximum(last + 1 - (low + HALF - 1) // HALF, 0) // 2
    return last, first, count, gl.minimum(gl.maximum(unmasked, 1), count)


@gluon.jit
def _clear(tile, number):
    """Zero the values behind the first `number` of a tile's upper half: behind a row's end, where NaN may lie."""
    VALUES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    upper = tile.slice(HALF, HALF, 0)
    held = gl.arange(0, HALF, gl.SliceLayout(1, VALUES)) < number
    upper.store(gl.where(held[:, None], upper.load(VALUES), 0.0))
    fence_async_shared()
    tl.debug_barrier()


@gluon.jit
def _put(out, context, place, left, NUM_HEADS: gl.constexpr, DIM: gl.constexpr):
    """Write `context` [QUERIES, DIM] for the first `left` tokens, 16 bytes a thread."""
    if DIM == 128:
        WIDE: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [2, 0], [4, 0], [8, 0]],
            [[0, 8], [0, 16], [0, 32], [0, 64], [1, 0]], [[16, 0], [32, 0]], [], [64, 128],
        )  # fmt: skip
    else:
        WIDE: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [4, 0], [8, 0]],
            [[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]], [[16, 0], [32, 0]], [], [64, 64],
        )  # fmt: skip
    result = gl.convert_layout(context.to(out.dtype.element_ty), WIDE)
    token, dim = gl.arange(0, QUERIES, gl.SliceLayout(1, WIDE)), gl.arange(0, DIM, gl.SliceLayout(0, WIDE))
    at = out + place + (token * (NUM_HEADS * DIM))[:, None] + dim[None, :]
    gl.store(at, result, mask=(token < left)[:, None])
