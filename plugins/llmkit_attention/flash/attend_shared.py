"""Kernel that reads the tiles which a pack of rows has in common once for all of them, behind the rows' own tiles."""

import triton
import triton.language as tl

from llmkit_attention.flash.tiles import accumulate, factor, offsets, page_ids, scores


@triton.jit
def attend_shared(
    query, key_pool, value_pool, key_tiles, value_tiles, out, own, partial, lse, starts, tables, table_stride,
    members, leaders, reaches, ends, arrivals, query_n, query_h, query_d, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    MEMBERS: tl.constexpr, QUERIES: tl.constexpr, DIM_PAD: tl.constexpr, PACKS: tl.constexpr, SHARES: tl.constexpr,
    SOFTCAP: tl.constexpr, BULK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (share, KV head): every SHARES-th part of the packs' tiles, for the head's GROUP queries of their rows.

    Normalised parts go to `partial` [part, head, QUERIES, DIM] and `lse` (base 2). The program that arrives last at a
    pack merges them into `out`, which holds what the rows' own tiles gave, with log-sum-exps `own` [N, query heads].
    """
    share, head = tl.program_id(0), tl.program_id(1)
    # What `list_packs` wrote is complete, and so are the queries: the kernel in front has waited for theirs.
    end = tl.load(ends + tl.arange(0, PACKS))
    size = tl.load(ends + PACKS)
    for part in range(share, tl.max(end, 0), SHARES):
        first = tl.max(tl.where(end <= part, end, 0), 0)
        pack = tl.sum((end <= part).to(tl.int32), 0)
        begin = (part - first) * size
        stop = tl.minimum(begin + size, tl.load(reaches + pack)) * TILE
        member, dim = tl.arange(0, QUERIES), tl.arange(0, DIM_PAD)
        row = tl.load(members + pack * MEMBERS + member // GROUP, mask=member < MEMBERS * GROUP, other=-1)
        token = tl.load(starts + row, mask=row >= 0, other=0).to(tl.int64)
        place = token[:, None] * query_n + (head * GROUP + member % GROUP)[:, None] * query_h + dim[None, :] * query_d
        real, inside = (row >= 0)[:, None] & (dim < DIM)[None, :], (dim < DIM)[None, :]
        block = factor(tl.load(query + place, mask=real, other=0.0), key_pool)
        table = tables + tl.load(leaders + pack).to(tl.int64) * table_stride
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        context = tl.zeros([QUERIES, DIM_PAD], tl.float32)
        page = page_ids(table, begin * TILE, stop, PAGE, TILE)
        for key in range(begin * TILE, stop, TILE):
            base = offsets(page, key + tl.arange(0, TILE), head, HEADS, PAGE, DIM)
            at = ((page * HEADS + head) * PAGE + key % PAGE).to(tl.int32) if BULK else 0
            page = page_ids(table, key + TILE, stop, PAGE, TILE)
            if BULK:
                stored, values = key_tiles.load([at, 0]), value_tiles.load([at, 0])
            else:
                stored = tl.load(key_pool + base[:, None] + dim[None, :], mask=inside, other=0.0)
                values = tl.load(value_pool + base[:, None] + dim[None, :], mask=inside, other=0.0)
            logits = scores(block, tl.trans(stored), scale, softcap, SOFTCAP)
            top, total, context = accumulate(logits, values.to(block.dtype), top, total, context)
        mine = (part * HEADS + head) * QUERIES + member
        tl.store(partial + mine[:, None] * DIM + dim[None, :], context / total[:, None], mask=real)
        tl.store(lse + mine, top + tl.log2(total), mask=row >= 0)
        tl.debug_barrier()
        number = tl.load(ends + pack) - first
        before = tl.atomic_add(arrivals + pack * HEADS + head, 1, sem="acq_rel")
        if PDL:
            tl.extra.cuda.gdc_wait()
        if before == number - 1:
            tl.debug_barrier()
            tl.store(arrivals + pack * HEADS + head, 0)
            _merge(
                out, own, partial, lse, starts, members + pack * MEMBERS, first, number, head,
                HEADS, GROUP, DIM, MEMBERS, QUERIES, DIM_PAD,
            )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _merge(
    out, own, partial, lse, starts, members, first, number, head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, MEMBERS: tl.constexpr, QUERIES: tl.constexpr,
    DIM_PAD: tl.constexpr,
):  # fmt: skip
    """Write what a pack's rows have, their own and `number` parts from `first` on, weighed by the log-sum-exps."""
    AT_ONCE: tl.constexpr = 4096 // DIM_PAD
    dim = tl.arange(0, DIM_PAD)[None, :]
    for chunk in range(0, QUERIES, AT_ONCE):
        member = chunk + tl.arange(0, AT_ONCE)
        row = tl.load(members + member // GROUP, mask=member < MEMBERS * GROUP, other=-1)
        held, real = row >= 0, (row >= 0)[:, None] & (dim < DIM)
        token = tl.load(starts + row, mask=held, other=0).to(tl.int64)
        place = token * (HEADS * GROUP) + head * GROUP + member % GROUP
        target = out + place[:, None] * DIM + dim
        top = tl.load(own + place, mask=held, other=0.0, cache_modifier=".cg")
        total = tl.full([AT_ONCE], 1.0, tl.float32)
        context = tl.load(target, mask=real, other=0.0, cache_modifier=".cg").to(tl.float32)
        for part in range(first, first + number):
            mine = (part * HEADS + head) * QUERIES + member
            log = tl.load(lse + mine, mask=held, other=0.0, cache_modifier=".cg")
            values = tl.load(partial + mine[:, None] * DIM + dim, mask=real, other=0.0, cache_modifier=".cg")
            new_top = tl.maximum(top, log)
            decay, weight = tl.exp2(top - new_top), tl.exp2(log - new_top)
            total = total * decay + weight
            context = context * decay[:, None] + values * weight[:, None]
            top = new_top
        tl.store(target, (context / total[:, None]).to(out.dtype.element_ty), mask=real)
