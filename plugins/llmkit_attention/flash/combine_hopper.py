"""Combines the parts of rows that lie in several shares of `decode_hopper.attend_one_hopper`."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WARPS = gl.constexpr(4)


@gluon.jit
def hand_over(
    out, own, partial, lse, starts, arrivals, row, first, last, size, head,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, ROWS_PAD: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """As `decode._hand_over`: the share that is the last to come here with its part of a row combines all."""
    first_share, last_share = first // size, last // size
    before = gl.atomic_add(arrivals + row * HEADS + head, 1, sem="acq_rel")
    if before == last_share - first_share:
        tl.debug_barrier()
        gl.store(arrivals + row * HEADS + head, 0)
        begins_inside = (first > first_share * size).to(gl.int32)
        token = gl.load(starts + row).to(gl.int64)
        _combine(
            out, own, partial, lse, token, first_share, last_share, begins_inside, head,
            HEADS, GROUP, DIM, ROWS_PAD, SHARED,
        )  # fmt: skip


@gluon.jit
def _combine(
    out, own, partial, lse, token, first_share, last_share, begins_inside, head,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, ROWS_PAD: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """Write a row's parts weighed by their log-sum-exps; the first share holds its part in slot `begins_inside`."""
    MEMBERS: gl.constexpr = triton.next_power_of_2(GROUP)
    PARTS: gl.constexpr = max(WARPS, 4096 // (MEMBERS * DIM))
    ALL: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    LOGS: gl.constexpr = gl.SliceLayout(2, ALL)
    WHOLE: gl.constexpr = gl.SliceLayout(0, ALL)
    ROWS: gl.constexpr = gl.SliceLayout(1, WHOLE)
    member = gl.arange(0, MEMBERS, gl.SliceLayout(0, LOGS))
    dim = gl.expand_dims(gl.arange(0, DIM, gl.SliceLayout(0, WHOLE)), 0)
    top = gl.full([MEMBERS], float("-inf"), gl.float32, gl.SliceLayout(0, LOGS))
    total = gl.zeros([MEMBERS], gl.float32, gl.SliceLayout(0, LOGS))
    context = gl.zeros([MEMBERS, DIM], gl.float32, WHOLE)
    for chunk in range(first_share, last_share + 1, PARTS):
        share = chunk + gl.arange(0, PARTS, gl.SliceLayout(1, LOGS))
        part = (share * HEADS + head) * 2 + gl.where(share == first_share, begins_inside, 0)
        row = part[:, None] * ROWS_PAD + member[None, :]
        held = (share <= last_share)[:, None] & (member < GROUP)[None, :]
        logs = gl.load(lse + row, mask=held, other=float("-inf"), cache_modifier=".cg")
        at = gl.expand_dims(row, 2) * DIM + gl.expand_dims(dim, 0)
        values = gl.load(partial + at, mask=gl.expand_dims(held, 2) & (at >= 0), other=0.0, cache_modifier=".cg")
        new_top = gl.maximum(top, gl.max(logs, 0))
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        weights, decay = gl.exp2(logs - base[None, :]), gl.exp2(top - base)
        total = total * decay + gl.sum(weights, 0)
        context = context * gl.convert_layout(decay, ROWS)[:, None] + gl.sum(values * gl.expand_dims(weights, 2), 0)
        top = new_top
    if SHARED:
        gl.store(own + token * (HEADS * GROUP) + head * GROUP + member, top + gl.log2(total), mask=member < GROUP)
    context = context / gl.convert_layout(gl.where(total == 0.0, 1.0, total), ROWS)[:, None]
    target = (token * (HEADS * GROUP) + head * GROUP + gl.arange(0, MEMBERS, ROWS))[:, None] * DIM + dim
    real = (gl.arange(0, MEMBERS, ROWS) < GROUP)[:, None] & (dim >= 0)
    gl.store(out + target, context.to(out.dtype.element_ty), mask=real)
