"""Host memory beside KV pools, to copy blocks to and from; on CUDA pinned, in the order of the device's queue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch

from llmkit_attention.blocks import to_device


class HostBlocks:
    """`num_blocks` blocks beside `pools`, tensors [2, blocks of the pool, ...], one a layer.

    Nothing here waits for the device: what is read from the host later must join the same queue.
    """

    def __init__(self, pools: Sequence[torch.Tensor], num_blocks: int) -> None:
        shapes = [torch.Size((2, num_blocks, *pool.shape[2:])) for pool in pools]
        is_pinned = pools[0].device.type == "cuda"
        # One piece, since every pinned one is rounded up to a power of two.
        ends = list(accumulate(shape.numel() for shape in shapes))
        memory = torch.empty(ends[-1], dtype=pools[0].dtype, pin_memory=is_pinned)
        self._host = [memory[end - shape.numel() : end].view(shape) for shape, end in zip(shapes, ends, strict=True)]
        self._pools = pools

    def save(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy `blocks` of every layer to `host_blocks`."""
        index = to_device(blocks, self._pools[0].device)
        for pool, host in zip(self._pools, self._host, strict=True):
            gathered = pool.index_select(1, index)
            for first, start, end in _runs(host_blocks):
                for half in (0, 1):
                    host[half, first : first + end - start].copy_(gathered[half, start:end], non_blocking=True)

    def restore(self, host_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy `host_blocks` of every layer back to `blocks`."""
        index = to_device(blocks, self._pools[0].device)
        for pool, host in zip(self._pools, self._host, strict=True):
            staged = pool.new_empty((2, len(blocks), *pool.shape[2:]))
            for first, start, end in _runs(host_blocks):
                for half in (0, 1):
                    staged[half, start:end].copy_(host[half, first : first + end - start], non_blocking=True)
            pool.index_copy_(1, index, staged)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches of `numbers` that count up by one: the first number, and the places where it starts and ends."""
    ends = [at + 1 for at, (one, other) in enumerate(pairwise(numbers)) if other != one + 1]
    for start, end in pairwise([0, *ends, len(numbers)]):
        yield numbers[start], start, end
