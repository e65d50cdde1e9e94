"""Kernels that choose greedy tokens and draw plain ones; the draw is that of `draw`, the noise that of `noise`.

The first one reads all logits and leaves each block's maximum and mass; the second one reads those, chooses a block of
the vocabulary by inverse CDF, reads it, and chooses a token inside it, likewise.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from llmkit.cuda import wait_for_previous


@triton.jit
def weigh_blocks(
    logits, stride, slots, settings, tops, masses, vocab_size, num_blocks,
    SIZE: tl.constexpr, TOGETHER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, part): maximum and mass, relative to it, of TOGETHER blocks of SIZE logits."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    token = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(logits + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    top = tl.max(value, 1)
    mass = tl.sum(weights_of(value, top[:, None], temperature_of(settings, tl.load(slots + row))), 1)
    tl.store(tops + row * num_blocks + block, top, mask=block < num_blocks)
    tl.store(masses + row * num_blocks + block, mass, mask=block < num_blocks)


@triton.jit
def choose(
    logits, stride, slots, positions, settings, tops, masses, token_ids, values, tokens, tokens_stride,
    vocab_size, num_blocks, SIZE: tl.constexpr, BLOCKS: tl.constexpr, STORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program row: a block, then a token inside it."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    key, temperature = tl.load(settings + 2 * slot), temperature_of(settings, slot)
    index, inside = tl.arange(0, BLOCKS), tl.arange(0, SIZE)
    tops_of_row = tl.load(tops + row * num_blocks + index, mask=index < num_blocks, other=float("-inf"))
    mass = tl.load(masses + row * num_blocks + index, mask=index < num_blocks, other=0.0)
    top = tl.max(tops_of_row, 0)
    mass = mass * weights_of(tops_of_row, top, temperature)
    total = tl.sum(mass, 0)
    block = _pick(mass, tops_of_row == top, uniform_of(key, 2 * position + 1), temperature, BLOCKS)
    token = block * SIZE + inside
    value = tl.load(logits + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    top_of_block = tl.max(value, 0)
    weights = weights_of(value, top_of_block, temperature)
    chosen = block * SIZE + _pick(
        weights, value == top_of_block, uniform_of(key, 2 * position + 2), temperature, SIZE
    )  # fmt: skip
    chosen = tl.minimum(chosen, vocab_size - 1).to(tl.int64)
    tl.store(token_ids + row, chosen)
    tl.store(values + row, tl.where((total > 0.0) & (total < float("inf")), total, float("nan")))
    if STORES:
        tl.store(tokens + slot * tokens_stride + position, chosen)


@triton.jit
def temperature_of(settings, slot):
    """A slot's temperature, 0 where greedy."""
    return tl.load(settings + 2 * slot + 1).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def weights_of(values, top, temperature):
    """exp((values - top) / temperature), at temperature 1 where greedy; 0 where everything is -inf, NaN where +inf."""
    scale = tl.where(temperature > 0.0, temperature, 1.0)
    return tl.exp((values - tl.where(top == float("-inf"), 0.0, top)) / scale)


@triton.jit
def _pick(weights, is_top, uniform, temperature, SIZE: tl.constexpr):
    """Index into `weights` [SIZE] by inverse CDF at `uniform`, or the first that `is_top` where greedy.

    Nothing of weight 0 is drawn, however sums are rounded. SIZE - 1 or less also where nothing can be chosen.
    """
    index = tl.arange(0, SIZE)
    first_top = tl.min(tl.where(is_top, index, SIZE - 1), 0)
    mass = tl.cumsum(weights.to(tl.float64), 0)
    reached = (mass > uniform * tl.max(mass, 0)) & (weights > 0.0)
    first = tl.min(tl.where(reached, index, SIZE), 0)
    return tl.where((temperature > 0.0) & (first < SIZE), first, first_top)


@triton.jit
def uniform_of(key, counter):
    """Number `counter` of `key`, a multiple of 2**-48 in [0, 1): SplitMix64, as in `noise`, on int64."""
    mixed = key.to(tl.uint64, bitcast=True) + counter.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    mixed = mixed ^ (mixed >> 31)
    return (mixed >> 16).to(tl.float64) * (1.0 / (1 << 48))
