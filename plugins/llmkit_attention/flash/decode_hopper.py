"""Decode kernel for Hopper: computes what `decode.attend_one` does, of the same list of tiles, with fewer instructions.

A warp of its own brings tiles into shared memory by bulk copies (TMA), several ahead. Of a row's keys only those of its
last tile can be as new as this step, so the others come before the kernel in front has ended. Four warps multiply
with the keys as rows (wgmma): scores are [TILE, queries], their weights go through shared memory, and neither keys nor
values pass through registers, but where they are stored in e4m3: these warps copy a tile as float16, its values while
its keys are multiplied.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from llmkit_attention.flash.combine_hopper import WARPS, hand_over
from llmkit_attention.flash.scores_hopper import in_range, scores

LISTED = gl.constexpr(128)
"""Tiles whose codes and pages are brought into shared memory at a time; twice as many are held."""
PART = gl.constexpr(16)
"""Keys of the smallest bulk copy: a row's last tile is read no further than its last key, rounded up to these."""
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
"""How tiles of 16-bit numbers lie in shared memory, as bulk copies write them and wgmma reads them."""
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit(do_not_specialize=["rows"])
def attend_one_hopper(
    query, key_tiles, value_tiles, key_parts, value_parts, out, own, partial, lse, starts, owners, codes, pages, ends,
    arrivals, rows, query_n, query_h, scale, softcap,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, TILE: gl.constexpr,
    ROWS_PAD: gl.constexpr, SHARES: gl.constexpr, LEAST: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr, SHARED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Arguments, grid and results as `decode.attend_one`.

    `key_tiles`, `value_tiles` are descriptors of the pools as [pages * HEADS * PAGE, DIM] with boxes [TILE, panel],
    `key_parts` and `value_parts` with boxes [PART, panel]; a panel has 128 bytes of a key, or all.
    """
    share, head = gl.program_id(0), gl.program_id(1)
    total = gl.load(ends + rows - 1)
    size = gl.maximum((total + SHARES - 1) // SHARES, LEAST)
    begin = share * size
    end = gl.minimum(begin + size, total)
    TYPE: gl.constexpr = key_tiles.dtype
    NARROW: gl.constexpr = TYPE.primitive_bitwidth == 8
    FACTORS: gl.constexpr = gl.float16 if NARROW else TYPE
    keys = gl.allocate_shared_memory(TYPE, [STAGES, TILE, DIM], key_tiles.layout)
    values = gl.allocate_shared_memory(TYPE, [STAGES, TILE, DIM], value_tiles.layout)
    wide_keys, wide_values = keys, values
    if NARROW:
        wide_keys = gl.allocate_shared_memory(FACTORS, [1, TILE, DIM], SWIZZLED)
        wide_values = gl.allocate_shared_memory(FACTORS, [1, TILE, DIM], SWIZZLED)
    packed = gl.allocate_shared_memory(FACTORS, [ROWS_PAD, DIM], SWIZZLED)
    weights = gl.allocate_shared_memory(FACTORS, [ROWS_PAD, TILE], SWIZZLED)
    listed = gl.allocate_shared_memory(gl.int32, [2, LISTED], PLAIN)
    listed_codes = gl.allocate_shared_memory(gl.int32, [2, LISTED], PLAIN)
    listed_pages = gl.allocate_shared_memory(gl.int32, [2, LISTED], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if begin < end:
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=1)
        fence_async_shared()
        opening, closing = gl.load(owners + begin), gl.load(owners + end - 1)
        first, last = _tiles_of(ends, opening)
        other_first, other_last = _tiles_of(ends, closing)
        gl.warp_specialize([
            (_attend, (
                query, keys, values, wide_keys, wide_values, packed, weights, full, empty, codes, listed, out, own,
                partial, lse, begin, end, share, head, query_n, query_h, scale, softcap,
                HEADS, GROUP, DIM, TILE, ROWS_PAD, STAGES, WINDOW, SOFTCAP, SHARED, PDL,
            )),
            (_bring, (
                key_tiles, value_tiles, key_parts, value_parts, keys, values, full, empty, codes, pages, listed_codes,
                listed_pages, begin, end, head, HEADS, DIM, PAGE, TILE, STAGES, PDL,
            )),
        ], [1], [48])  # fmt: skip
        if PDL:  # not sooner: programs of the next kernel that wait here would crowd out some of this one's
            tl.extra.cuda.gdc_launch_dependents()
        tl.debug_barrier()
        for item in range(gl.where(closing == opening, 1, 2)):
            if (first < begin) | (last >= end):
                row = gl.where(item == 0, opening, closing)
                hand_over(
                    out, own, partial, lse, starts, arrivals, row, first, last, size, head,
                    HEADS, GROUP, DIM, ROWS_PAD, SHARED,
                )  # fmt: skip
            first, last = other_first, other_last
    elif PDL:
        tl.extra.cuda.gdc_wait()


@gluon.jit
def _bring(
    key_tiles, value_tiles, key_parts, value_parts, keys, values, full, empty, codes, pages, listed_codes, listed_pages,
    begin, end, head,
    HEADS: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """One warp: tiles `begin` to `end` into the ring [STAGES, TILE, DIM] of `keys` and of `values`."""
    WIDTH: gl.constexpr = key_tiles.block_type.shape[1]
    PANELS: gl.constexpr = DIM // WIDTH
    PARTS: gl.constexpr = TILE // PART
    BYTES: gl.constexpr = PART * DIM * 2 * (keys.dtype.primitive_bitwidth // 8)
    stage, phase, has_waited = gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(0)
    _list(codes, listed_codes, begin, end, 0, 1)
    _list(pages, listed_pages, begin, end, 0, 1)
    for number in range(end - begin):
        if number % LISTED == 0:
            _list(codes, listed_codes, begin, end, number // LISTED + 1, 1)
            _list(pages, listed_pages, begin, end, number // LISTED + 1, 1)
        code, page = _listed(listed_codes, number, 1), _listed(listed_pages, number, 1)
        place = (page // (PAGE // TILE) * HEADS + head) * PAGE + page % (PAGE // TILE) * TILE
        if PDL:  # noqa: SIM102 - the compiler drops only what a constant alone decides
            if (code & 1) > has_waited:
                tl.extra.cuda.gdc_wait()
                has_waited = gl.to_tensor(1)
        mbarrier.wait(empty.index(stage), phase)
        bar, parts = full.index(stage), ((code >> 2) & (TILE - 1)) // PART + 1
        for count in gl.static_range(1, PARTS + 1):
            mbarrier.expect(bar, count * BYTES, pred=parts == count)  # of keys and of values
        if parts == PARTS:
            key_panels = keys.index(stage)._reinterpret(keys.dtype, [PANELS, TILE, WIDTH], key_tiles.layout)
            value_panels = values.index(stage)._reinterpret(keys.dtype, [PANELS, TILE, WIDTH], key_tiles.layout)
            for panel in gl.static_range(PANELS):
                tma.async_copy_global_to_shared(key_tiles, [place, panel * WIDTH], bar, key_panels.index(panel))
            for panel in gl.static_range(PANELS):
                tma.async_copy_global_to_shared(value_tiles, [place, panel * WIDTH], bar, value_panels.index(panel))
        else:
            key_pieces = keys.index(stage)._reinterpret(keys.dtype, [PANELS * PARTS, PART, WIDTH], key_parts.layout)
            value_pieces = values.index(stage)._reinterpret(keys.dtype, [PANELS * PARTS, PART, WIDTH], key_parts.layout)
            for piece in gl.static_range(PANELS * PARTS):
                at, held = [place + piece % PARTS * PART, piece // PARTS * WIDTH], piece % PARTS < parts
                tma.async_copy_global_to_shared(key_parts, at, bar, key_pieces.index(piece), pred=held)
                tma.async_copy_global_to_shared(value_parts, at, bar, value_pieces.index(piece), pred=held)
        stage += 1
        if stage == STAGES:
            stage = gl.to_tensor(0)
            phase ^= 1


@gluon.jit
def _attend(
    query, keys, values, wide_keys, wide_values, packed, weights, full, empty, codes, listed, out, own, partial, lse,
    begin, end, share, head, query_n, query_h, scale, softcap,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, TILE: gl.constexpr, ROWS_PAD: gl.constexpr,
    STAGES: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SHARED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps: the running softmax over tiles `begin` to `end`, and what whole rows and parts of rows come to."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS_PAD, 16])
    QUERY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    NARROW: gl.constexpr = keys.dtype.primitive_bitwidth == 8
    asking = gl.arange(0, ROWS_PAD, gl.SliceLayout(1, QUERY))[:, None]
    place = (head * GROUP + asking) * query_h + gl.arange(0, DIM, gl.SliceLayout(0, QUERY))[None, :]
    zeros = gl.zeros([TILE, ROWS_PAD], gl.float32, SCORES)
    top = gl.full([ROWS_PAD], float("-inf"), gl.float32, gl.SliceLayout(0, SCORES))
    weight, context = zeros, warpgroup_mma_init(gl.zeros([DIM, ROWS_PAD], gl.float32, SCORES))
    code = gl.load(codes + begin)
    _list(codes, listed, begin, end, 0, WARPS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    coming = gl.load(query + (code >> 14).to(gl.int64) * query_n + place, mask=asking < GROUP, other=0.0)
    slot, begins, opens = gl.to_tensor(0), (code & 2) != 0, gl.to_tensor(True)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for number in range(end - begin):
        if number % LISTED == 0:
            _list(codes, listed, begin, end, number // LISTED + 1, WARPS)
        now, code = code, _listed(listed, number + 1, WARPS)
        if opens:
            packed.store(in_range(coming, packed.dtype))
            fence_async_shared()
        if (code & 2) != 0:
            coming = gl.load(query + (code >> 14).to(gl.int64) * query_n + place, mask=asking < GROUP, other=0.0)
        seen, lowest = (now >> 2) & (TILE - 1), (now >> 8) & (TILE - 1)
        mbarrier.wait(full.index(stage), phase)
        logits, so_far = scores(
            keys.index(stage), values.index(stage), wide_keys.index(0), wide_values.index(0), packed, context, zeros,
            lowest, seen, scale, softcap, TILE, DIM, SOFTCAP,
        )  # fmt: skip
        new_top = gl.maximum(top, gl.max(logits, 0))
        fresh, decay = gl.exp2(logits - new_top[None, :]), gl.exp2(top - new_top)
        top, weight = new_top, weight * decay[None, :] + fresh
        weights.permute((1, 0)).store(fresh.to(weights.dtype))
        fence_async_shared()
        tl.debug_barrier()  # all have copied this stage, or multiplied with the one before
        if NARROW:
            mbarrier.arrive(empty.index(stage))
            factors = wide_values.index(0)
        else:
            mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), pred=number > 0)
            factors = values.index(stage)
        context = warpgroup_mma(
            factors.permute((1, 0)), weights.permute((1, 0)),
            warpgroup_mma_init(so_far * decay[None, :]), is_async=True,
        )  # fmt: skip
        opens = (now & 1) != 0
        stage += 1
        if stage == STAGES:
            stage = gl.to_tensor(0)
            phase ^= 1
        if opens | (number == end - begin - 1):
            whole, sums = warpgroup_mma_wait(0, deps=[context]), gl.sum(weight, 0)
            part = ((share * HEADS + head) * 2 + slot) * ROWS_PAD
            _put(
                whole / sums[None, :], top + gl.log2(sums), out, own, partial, lse, (now >> 14).to(gl.int64), head,
                part, begins & opens, HEADS, GROUP, DIM, ROWS_PAD, SHARED, SCORES,
            )  # fmt: skip
            top = gl.full([ROWS_PAD], float("-inf"), gl.float32, gl.SliceLayout(0, SCORES))
            weight, context = zeros, warpgroup_mma_init(gl.zeros([DIM, ROWS_PAD], gl.float32, SCORES))
            slot, begins = gl.to_tensor(1), gl.to_tensor(True)


@gluon.jit
def _list(source, entries, begin, end, chunk, NUM_WARPS: gl.constexpr):
    """Entries of tiles `begin` + `chunk` * LISTED and on, into one half of `entries` [2, LISTED]."""
    inner = gl.arange(0, LISTED, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    at = gl.minimum(begin + chunk * LISTED + inner, end - 1)
    entries.index(chunk & 1).store(gl.load(source + at))


@gluon.jit
def _listed(entries, number, NUM_WARPS: gl.constexpr):
    """The entry of the share's tile `number`."""
    one = entries._reinterpret(gl.int32, [2 * LISTED, 1], PLAIN).index(number & (2 * LISTED - 1))
    return gl.sum(one.load(gl.BlockedLayout([1], [32], [NUM_WARPS], [0])), 0)


@gluon.jit
def _put(
    context, log, out, own, partial, lse, token, head, part, is_whole,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, ROWS_PAD: gl.constexpr, SHARED: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """Write a whole row's result [DIM, ROWS_PAD] to `out`, or a part of one."""
    member, dim = gl.arange(0, ROWS_PAD, gl.SliceLayout(0, SCORES)), gl.arange(0, DIM, gl.SliceLayout(1, SCORES))
    target = token * (HEADS * GROUP) + head * GROUP + member
    real = (member < GROUP)[None, :]
    gl.store(out + target[None, :] * DIM + dim[:, None], context.to(out.dtype.element_ty), mask=real & is_whole)
    gl.store(partial + (part + member)[None, :] * DIM + dim[:, None], context, mask=real & (not is_whole))
    gl.store(lse + part + member, log, mask=(member < GROUP) & (not is_whole))
    if SHARED:
        gl.store(own + target, log, mask=(member < GROUP) & is_whole)


@gluon.jit
def _tiles_of(ends, row):
    """A row's first and last tile."""
    return gl.load(ends + row - 1, mask=row > 0, other=0), gl.load(ends + row) - 1
