"""Plain rows sampled on an NVIDIA GPU in one read of the logits, greedy and drawn ones alike, without the host.

The draw is that of `llmkit.model.sampling.draw`, with the numbers of `llmkit.model.sampling.noise` made on the device:
a block of the vocabulary by inverse CDF, then a token inside it, likewise. The first kernel reads all logits and leaves
each block's maximum and mass; the second one reads those and the chosen block. Shapes and launches depend on the number
of rows only, so both can be captured in a CUDA graph.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit.cuda import can_overlap
from llmkit.model.layer_kernels import wait_for_previous
from llmkit.model.sampling.draw import block_size_for
from llmkit.model.sampling.transfer import to_device

AT_ONCE = 4096
"""Logits one program of the first kernel reads."""


class DeviceSampler:
    """Settings of every slot on the device, and the choice of one token per row from them.

    Slots that were never set, such as the one behind the last, are greedy.
    """

    def __init__(self, vocab_size: int, num_slots: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._block_size = block_size_for(vocab_size)
        self._num_blocks = triton.cdiv(vocab_size, self._block_size)
        self._overlaps = can_overlap(device)
        self._settings = torch.zeros(num_slots, 2, dtype=torch.int64, device=device)
        self._known = [(0, 0)] * num_slots

    def set_slot(self, slot: int, temperature: float, key: int) -> None:
        """Rows of `slot` are drawn at `temperature`, or greedy if that is 0, with noise of `key`, below 2**64."""
        (bits,) = struct.unpack("<i", struct.pack("<f", temperature))
        settings = (key - (key >> 63 << 64), bits) if temperature > 0 else (0, 0)
        if settings != self._known[slot]:
            self._known[slot] = settings
            self._settings[slot] = to_device(settings, self._settings.device, torch.int64)

    def choose(
        self, logits: Tensor, slots: Tensor, positions: Tensor, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A token for every row of `logits` [R, >= vocab_size] in a dtype up to float32, last stride 1.

        `slots`, `positions` int64 [R]: whose row it is, and the index its token takes in the sequence. If given,
        `tokens` int64 [num_slots, max_len] gets the token there. Returns int64 [R] below `vocab_size`, the lowest id
        among equals where greedy, and float32 [R]: finite if the row had something to choose from, else NaN.
        """
        num_rows, size, num_blocks = len(logits), self._block_size, self._num_blocks
        parts = torch.empty(2, num_rows, num_blocks, dtype=torch.float32, device=logits.device)
        token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        values = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        together = min(max(1, AT_ONCE // size), triton.next_power_of_2(num_blocks))
        _weigh_blocks[(num_rows, triton.cdiv(num_blocks, together))](
            logits, logits.stride(0), slots, self._settings, parts[0], parts[1], self._vocab_size, num_blocks,
            SIZE=size, TOGETHER=together, PDL=self._overlaps, launch_pdl=self._overlaps, num_warps=4,
        )  # fmt: skip
        _choose[(num_rows,)](
            logits, logits.stride(0), slots, positions, self._settings, parts[0], parts[1], token_ids, values,
            token_ids if tokens is None else tokens, 0 if tokens is None else tokens.stride(0),
            self._vocab_size, num_blocks,
            SIZE=size, BLOCKS=triton.next_power_of_2(num_blocks), STORES=tokens is not None,
            PDL=self._overlaps, launch_pdl=self._overlaps, num_warps=4,
        )  # fmt: skip
        return token_ids, values


@triton.jit
def _weigh_blocks(
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
    mass = tl.sum(_weights(value, top[:, None], _temperature(settings, tl.load(slots + row))), 1)
    tl.store(tops + row * num_blocks + block, top, mask=block < num_blocks)
    tl.store(masses + row * num_blocks + block, mass, mask=block < num_blocks)


@triton.jit
def _choose(
    logits, stride, slots, positions, settings, tops, masses, token_ids, values, tokens, tokens_stride,
    vocab_size, num_blocks, SIZE: tl.constexpr, BLOCKS: tl.constexpr, STORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program row: a block, then a token inside it."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    key, temperature = tl.load(settings + 2 * slot), _temperature(settings, slot)
    index, inside = tl.arange(0, BLOCKS), tl.arange(0, SIZE)
    tops_of_row = tl.load(tops + row * num_blocks + index, mask=index < num_blocks, other=float("-inf"))
    mass = tl.load(masses + row * num_blocks + index, mask=index < num_blocks, other=0.0)
    top = tl.max(tops_of_row, 0)
    mass = mass * _weights(tops_of_row, top, temperature)
    total = tl.sum(mass, 0)
    block = _pick(mass, tops_of_row == top, _uniform(key, 2 * position + 1), temperature, BLOCKS)
    token = block * SIZE + inside
    value = tl.load(logits + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    top_of_block = tl.max(value, 0)
    weights = _weights(value, top_of_block, temperature)
    chosen = block * SIZE + _pick(
        weights, value == top_of_block, _uniform(key, 2 * position + 2), temperature, SIZE
    )  # fmt: skip
    chosen = tl.minimum(chosen, vocab_size - 1).to(tl.int64)
    tl.store(token_ids + row, chosen)
    tl.store(values + row, tl.where((total > 0.0) & (total < float("inf")), total, float("nan")))
    if STORES:
        tl.store(tokens + slot * tokens_stride + position, chosen)


@triton.jit
def _temperature(settings, slot):
    """A slot's temperature, 0 where greedy."""
    return tl.load(settings + 2 * slot + 1).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _weights(values, top, temperature):
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
def _uniform(key, counter):
    """Number `counter` of `key`, a multiple of 2**-48 in [0, 1): SplitMix64, as in `noise`, on int64."""
    mixed = key.to(tl.uint64, bitcast=True) + counter.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    mixed = mixed ^ (mixed >> 31)
    return (mixed >> 16).to(tl.float64) * (1.0 / (1 << 48))
