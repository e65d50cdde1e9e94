"""Copies of blocks within KV pools, tensors [2, blocks of the pool, ...], one a layer; nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmkit import BlockCopy


def copy_blocks(pools: Sequence[torch.Tensor], copies: Sequence[BlockCopy], block_size: int | None = None) -> None:
    """Copy blocks of every layer; all are read before any is written.

    With `block_size` the slots come first in a block, and those behind the tokens copied are cleared.
    """
    sources, blocks, num_tokens = to_device(copies, pools[0].device).unbind(1)
    behind = None if block_size is None else torch.arange(block_size, device=blocks.device) >= num_tokens[:, None]
    for pool in pools:
        copied = pool.index_select(1, sources)
        if behind is not None:
            copied.view(2, *behind.shape, -1).masked_fill_(behind[:, :, None], 0.0)
        pool.index_copy_(1, blocks, copied)


def to_device(numbers: Sequence[int] | Sequence[BlockCopy], device: torch.device) -> torch.Tensor:
    """Host integers as int64 on `device`, copied without waiting for it."""
    table = torch.tensor(numbers, dtype=torch.long)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
