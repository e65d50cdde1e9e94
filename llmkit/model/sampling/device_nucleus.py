"""Top-k, top-p and min-p on an NVIDIA GPU without sorting; the definitions and the draw are those of `nucleus`.

Each filter keeps an upper end of a row's sorted logits, and the draw is an inverse CDF over what is left, so all ask
the same: which is the highest logit such that it and all above it are so many, or weigh so much? Logits are compared
as integers of the same order, and the answer is bracketed in a few passes over the row, which the caches hold. Equal
logits are one answer; the one of them that is meant follows from their number and weight.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmkit.cuda import wait_for_previous
from llmkit.model.sampling.device_draw import temperature_of, uniform_of, weights_of

UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Lowest bits of a float32 that say nothing in numbers of a dtype."""


@triton.jit
def choose_filtered(
    logits, stride, slots, positions, settings, filters, tops, masses, token_ids, values, vocab_size, num_blocks,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, UNUSED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program row: `filters` int64 [slots, 3] are top-k, 0 for off, and the bits of top-p and min-p as float64."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    temperature, row_logits = temperature_of(settings, slot), logits + row * stride
    block = tl.arange(0, BLOCKS)
    of_blocks = tl.load(tops + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
    top = tl.max(of_blocks, 0)
    mass = tl.load(masses + row * num_blocks + block, mask=block < num_blocks, other=0.0)
    total = tl.sum(mass * weights_of(of_blocks, top, temperature), 0)
    tl.store(values + row, tl.where((total > 0.0) & (total < float("inf")), total, float("nan")))
    low, kept = _filter(row_logits, vocab_size, filters + 3 * slot, of_blocks, top, temperature, TILE, UNUSED)
    wanted = kept * (1.0 - uniform_of(tl.load(settings + 2 * slot), 2 * position + 1))
    high = _key(top, UNUSED)
    low = _highest_with(row_logits, vocab_size, low, high, wanted, top, temperature, True, TILE, UNUSED)
    reached, equals, weight = _from(row_logits, vocab_size, low, 0.0, top, temperature, TILE, UNUSED)
    low = tl.where(equals > 0, low, high)
    nth = tl.maximum(equals - 1 - _number(reached - wanted, equals, weight).to(tl.int32), 0)
    tl.store(token_ids + row, _nth(row_logits, vocab_size, low, nth, TILE, UNUSED).to(tl.int64))


@triton.jit
def _filter(
    logits, vocab_size, filters, of_blocks, top, temperature, TILE: tl.constexpr, UNUSED: tl.constexpr
):  # fmt: skip
    """A key that all tokens reach which a row's `filters` keep, and the mass of those, float64."""
    top_k = tl.load(filters)
    top_p, min_p = tl.load(filters + 1).to(tl.float64, bitcast=True), tl.load(filters + 2).to(tl.float64, bitcast=True)
    high, least = _key(top, UNUSED), _key(tl.full([], float("-inf"), tl.float32), UNUSED)
    if top_k > 0:
        kth_block = _kth(of_blocks, top_k, least, high, UNUSED)
        least = _highest_with(
            logits, vocab_size, kth_block, high, top_k.to(tl.float64), top, temperature, False, TILE, UNUSED
        )
    kept, _, _ = _from(logits, vocab_size, least, 0.0, top, temperature, TILE, UNUSED)
    # What lies below this weighs less than a thousandth of what top-p drops, or than any draw can tell from nothing.
    share = tl.maximum(1.0 - top_p, 1e-9).to(tl.float32)
    low = tl.maximum(least, _key(top - temperature * tl.log(1e3 * vocab_size / share), UNUSED))
    if top_p < 1.0:
        wanted = top_p * kept
        low = _highest_with(logits, vocab_size, low, high, wanted, top, temperature, True, TILE, UNUSED)
        reached, equals, weight = _from(logits, vocab_size, low, 0.0, top, temperature, TILE, UNUSED)
        kept = reached - _number(reached - wanted, equals, weight) * weight
    if min_p > 0.0:
        likely, _, _ = _from(logits, vocab_size, least, min_p.to(tl.float32), top, temperature, TILE, UNUSED)
        kept = tl.minimum(kept, likely)
    return low, kept


@triton.jit
def _key(value, UNUSED: tl.constexpr):
    """float32 -> int32 of the same order."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> UNUSED


@triton.jit
def _tile(logits, vocab_size, first, TILE: tl.constexpr):
    """A tile of a row's logits, float32, -inf behind its end."""
    token = first + tl.arange(0, TILE)
    return tl.load(logits + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def _kth(values, k, low, high, UNUSED: tl.constexpr):
    """Key of the k-th largest of `values` [BLOCKS], or `low` if there are fewer, within `low` to `high`."""
    keys = _key(values, UNUSED)
    while low < high:
        middle = (low.to(tl.int64) + high + 1 >> 1).to(tl.int32)
        is_enough = tl.sum((keys >= middle).to(tl.int32), 0) >= k
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit
def _highest_with(
    logits, vocab_size, low, high, wanted, top, temperature,
    BY_MASS: tl.constexpr, TILE: tl.constexpr, UNUSED: tl.constexpr,
):  # fmt: skip
    """The highest key within `low` to `high` such that tokens from it on weigh, or are, at least `wanted`.

    Taken for granted of `low`. Every pass asks three keys in between.
    """
    while low < high:
        width = high.to(tl.int64) - low
        first = (low + (width + 3) // 4).to(tl.int32)
        second = (low + (width + 1) // 2).to(tl.int32)
        third = (low + (3 * width + 3) // 4).to(tl.int32)
        from_first = tl.zeros([TILE], tl.float32)
        from_second = tl.zeros([TILE], tl.float32)
        from_third = tl.zeros([TILE], tl.float32)
        for start in range(0, vocab_size, TILE):
            value = _tile(logits, vocab_size, start, TILE)
            key = _key(value, UNUSED)
            weight = weights_of(value, top, temperature) if BY_MASS else tl.full([TILE], 1.0, tl.float32)
            from_first += tl.where(key >= first, weight, 0.0)
            from_second += tl.where(key >= second, weight, 0.0)
            from_third += tl.where(key >= third, weight, 0.0)
        is_first = tl.sum(from_first.to(tl.float64), 0) >= wanted
        is_second = is_first & (tl.sum(from_second.to(tl.float64), 0) >= wanted)
        is_third = is_second & (tl.sum(from_third.to(tl.float64), 0) >= wanted)
        high = tl.where(is_third, high, tl.where(is_second, third, tl.where(is_first, second, first)) - 1)
        low = tl.where(is_third, third, tl.where(is_second, second, tl.where(is_first, first, low)))
    return low


@triton.jit
def _from(logits, vocab_size, low, least, top, temperature, TILE: tl.constexpr, UNUSED: tl.constexpr):
    """Mass of tokens with keys from `low` and weights from `least` on, the number of those at `low`, their weight."""
    mass = tl.zeros([TILE], tl.float32)
    equals = tl.zeros([TILE], tl.int32)
    weight_at_low = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab_size, TILE):
        value = _tile(logits, vocab_size, start, TILE)
        key, weight = _key(value, UNUSED), weights_of(value, top, temperature)
        mass += tl.where((key >= low) & (weight >= least), weight, 0.0)
        equals += (key == low).to(tl.int32)
        weight_at_low = tl.maximum(weight_at_low, tl.where(key == low, weight, 0.0))
    return tl.sum(mass.to(tl.float64), 0), tl.sum(equals, 0), tl.max(weight_at_low, 0).to(tl.float64)


@triton.jit
def _number(mass, equals, weight):
    """Which of `equals` tokens of the same weight a mass from below falls on, from 0."""
    return tl.maximum(
        tl.minimum(tl.floor(mass / tl.where(weight > 0.0, weight, 1.0)), (equals - 1).to(tl.float64)), 0.0
    )


@triton.jit
def _nth(logits, vocab_size, wanted, nth, TILE: tl.constexpr, UNUSED: tl.constexpr):
    """The id of the `nth` token, from 0, whose key is `wanted`; some id if there is none, as in rows of NaN."""
    found, before = vocab_size - 1, 0
    for start in range(0, vocab_size, TILE):
        is_equal = (_key(_tile(logits, vocab_size, start, TILE), UNUSED) == wanted).to(tl.int32)
        order = before + tl.cumsum(is_equal, 0)
        token = start + tl.arange(0, TILE)
        found = tl.minimum(found, tl.min(tl.where((is_equal == 1) & (order == nth + 1), token, vocab_size - 1), 0))
        before += tl.sum(is_equal, 0)
    return found
