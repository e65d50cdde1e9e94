"""Rows sampled on an NVIDIA GPU without the host: plain ones in one read of the logits, filtered ones without sorting.

Shapes and launches depend on the number of rows only, so they can be captured in a CUDA graph.
"""

from __future__ import annotations

import struct

import torch
import triton
from torch import Tensor

from llmkit.cuda import overlap
from llmkit.model.sampling.device_draw import choose, weigh_blocks
from llmkit.model.sampling.device_nucleus import UNUSED_BITS, choose_filtered
from llmkit.model.sampling.draw import block_size_for
from llmkit.model.sampling.transfer import to_device

AT_ONCE = 4096
"""Logits one program reads that weighs blocks."""
TILE = 8192
"""Logits that a program which filters looks at together."""


class DeviceSampler:
    """Settings of every slot on the device, and the choice of one token per row from them.

    Slots that were never set, such as the one behind the last, are greedy.
    """

    def __init__(self, vocab_size: int, num_slots: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._block_size = block_size_for(vocab_size)
        self._num_blocks = triton.cdiv(vocab_size, self._block_size)
        self._overlap = overlap(device)
        self._settings = torch.zeros(num_slots, 2, dtype=torch.int64, device=device)
        self._filters = to_device([_filter_bits(0, 1.0, 0.0)] * num_slots, device, torch.int64)
        self._known: list[tuple[int, ...]] = [(0, 0)] * num_slots

    def set_slot(
        self, slot: int, temperature: float, key: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
    ) -> None:
        """Rows of `slot` are drawn at `temperature`, or greedy if that is 0, with noise of `key`, below 2**64.

        The filters, each off by default, only matter to `choose_filtered`.
        """
        (bits,) = struct.unpack("<i", struct.pack("<f", temperature))
        settings: tuple[int, ...] = (0, 0)
        if temperature > 0:
            settings = (key - (key >> 63 << 64), bits, *_filter_bits(top_k, top_p, min_p))
        if settings != self._known[slot]:
            self._known[slot] = settings
            self._settings[slot] = to_device(settings[:2], self._settings.device, torch.int64)
            if temperature > 0:
                self._filters[slot] = to_device(settings[2:], self._settings.device, torch.int64)

    def choose(self, logits: Tensor, slots: Tensor, positions: Tensor, tokens: Tensor | None = None) -> Tensor:
        """A token for every row of `logits` [R, >= vocab_size] in a dtype up to float32, last stride 1.

        `slots`, `positions` int64 [R]: whose row it is, and the index its token takes in the sequence. If given,
        `tokens` int64 [num_slots, max_len] gets the token there. Returns int64 [2, R]: ids below `vocab_size`, the
        lowest among equals where greedy, and the bits of a float64, finite if the row had something to choose from.
        """
        parts, results = self._weighed(logits, slots)
        choose[(len(logits),)](
            logits, logits.stride(0), slots, positions, self._settings, parts[0], parts[1], *split(results),
            results if tokens is None else tokens, 0 if tokens is None else tokens.stride(0),
            self._vocab_size, self._num_blocks, SIZE=self._block_size, BLOCKS=triton.next_power_of_2(self._num_blocks),
            STORES=tokens is not None, **self._overlap, num_warps=4,
        )  # fmt: skip
        return results

    def choose_filtered(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """As `choose`, by each row's top-k, then top-p, then min-p; no row may be greedy."""
        parts, results = self._weighed(logits, slots)
        choose_filtered[(len(logits),)](
            logits, logits.stride(0), slots, positions, self._settings, self._filters, parts[0], parts[1],
            *split(results), self._vocab_size, self._num_blocks, BLOCKS=triton.next_power_of_2(self._num_blocks),
            TILE=min(TILE, triton.next_power_of_2(self._vocab_size)), UNUSED=UNUSED_BITS[logits.dtype],
            **self._overlap, num_warps=16,
        )  # fmt: skip
        return results

    def _weighed(self, logits: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Maxima and masses of blocks, float32 [2, R, blocks], and room for the results."""
        num_rows, size, num_blocks = len(logits), self._block_size, self._num_blocks
        parts = torch.empty(2, num_rows, num_blocks, dtype=torch.float32, device=logits.device)
        results = torch.empty(2, num_rows, dtype=torch.int64, device=logits.device)
        together = min(max(1, AT_ONCE // size), triton.next_power_of_2(num_blocks))
        weigh_blocks[(num_rows, triton.cdiv(num_blocks, together))](
            logits, logits.stride(0), slots, self._settings, parts[0], parts[1], self._vocab_size, num_blocks,
            SIZE=size, TOGETHER=together, **self._overlap, num_warps=4,
        )  # fmt: skip
        return parts, results


def split(results: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids int64 [R] and values float64 [R] of what a `DeviceSampler` chose, as views."""
    return results[0], results[1].view(torch.float64)


def _filter_bits(top_k: int, top_p: float, min_p: float) -> tuple[int, ...]:
    return (top_k, *struct.unpack("<qq", struct.pack("<dd", top_p, min_p)))
