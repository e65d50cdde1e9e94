"""Paged attention in Triton, for CUDA: a step's single-token rows by one kernel, longer rows by another.

Keys and values lie in two pools [num_blocks, num_kv_heads, block_size, head_dim] a layer, so what one KV head reads of
a block is one contiguous tile. The kernels load no slot behind a row's keys, so nothing is ever cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmkit.interfaces.attention import AttentionBackend, AttentionBatch, AttentionRequirements, KeyValueSlots
from llmkit_attention.flash.limits import reasons_against
from llmkit_attention.host import HostBlocks

if TYPE_CHECKING:
    from llmkit_attention.flash.launch import Launch, TileList

QUERIES = 64
"""New tokens one prefill program takes."""


@dataclass(frozen=True, slots=True)
class _Step:
    """`tiles` int32 [T, 2], (row, first new token) of every prefill program, None for none.

    `singles` list the keys of single-token rows by the layers' window; empty if there are no such rows.
    """

    batch: AttentionBatch
    tiles: torch.Tensor | None
    singles: dict[Launch, TileList]


class FlashAttention(AttentionBackend):
    """Grouped heads, windows and soft caps, head dimensions 16 to 256, in bfloat16 or float16.

    Steps of single tokens launch grids that depend on nothing but the number of rows and `max_seq_len`, read every
    length and block on the device and allocate only their result: they can be captured in a CUDA graph. A row that
    only fills up a captured batch has one token, `seq_lens` 0 and slot -1; it reads and stores nothing, and what
    it gives is arbitrary.
    """

    preferred_block_size = 64

    @classmethod
    def check(cls, requirements: AttentionRequirements) -> list[str]:
        return reasons_against(requirements)

    def bytes_per_block(self) -> int:
        per_token = sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.requirements.layers)
        return per_token * self.requirements.block_size * self.dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        # Only here, so that `check` can say that triton is missing where it is.
        from llmkit_attention.flash.launch import Launch, Workspace

        layers, block_size = self.requirements.layers, self.requirements.block_size
        self._pools = [
            torch.zeros(
                (2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim), dtype=self.dtype, device=self.device
            )
            for spec in layers
        ]
        workspace = Workspace(layers, self.device)
        launches = {spec: Launch(spec, block_size, workspace) for spec in dict.fromkeys(layers)}
        self._launches = [launches[spec] for spec in layers]
        self._seen = [launch.pool(pool) for launch, pool in zip(self._launches, self._pools, strict=True)]
        self._tilings = list({launch.tiling: launch for launch in self._launches}.values())

    def allocate_host(self, num_blocks: int) -> bool:
        self._host = HostBlocks(self._pools, num_blocks)
        return True

    def save_blocks(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        self._host.save(blocks, host_blocks)

    def restore_blocks(self, host_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        self._host.restore(host_blocks, blocks)

    def capturable(self, batch: AttentionBatch) -> bool:
        return self.device.type == "cuda" and batch.max_query_len == 1

    def plan(self, batch: AttentionBatch) -> None:
        singles = {}
        if 1 in batch.query_lens:
            lists = {launch.tiling: launch.list_tiles(batch) for launch in self._tilings}
            singles = {launch: lists[launch.tiling] for launch in dict.fromkeys(self._launches)}
        if batch.max_query_len == 1:
            self._step = _Step(batch, None, singles)
            return
        tiles = [
            (row, first)
            for row, length in enumerate(batch.query_lens)
            if length > 1
            for first in reversed(range(0, length, QUERIES))
        ]
        self._step = _Step(batch, self._to_device(tiles) if tiles else None, singles)

    def _to_device(self, tiles: list[tuple[int, int]]) -> torch.Tensor:
        """The tiles as int32 [T, 2], copied without waiting for the device."""
        table = torch.tensor(tiles, dtype=torch.int32)
        return table.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else table

    def slots(self, layer: int) -> KeyValueSlots:
        pool = self._seen[layer]
        return KeyValueSlots(pool.keys, pool.values, self._step.batch.slot_mapping)

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self._launches[layer].write(key, value, self.slots(layer))
        return self.attend(layer, query)

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        pool, launch, step = self._seen[layer], self._launches[layer], self._step
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if step.tiles is not None:
            launch.prefill(query, pool, out, step.tiles, QUERIES, step.batch)
        if step.singles:
            launch.decode(query, pool, out, step.singles[launch], step.batch)
        return out
