"""Paged attention in Triton, for CUDA: a step's single-token rows by one kernel, longer rows by another.

Keys and values lie in two pools [num_blocks, num_kv_heads, block_size, head_dim] a layer, so what one KV head reads of
a block is one contiguous tile. The kernels load no slot behind a row's keys, or zero their own copy of it, so nothing
in a pool is ever cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmkit import BlockCopy, ConfigError
from llmkit.interfaces.attention import AttentionBackend, AttentionBatch, AttentionRequirements, KeyValueSlots
from llmkit.interfaces.settings import Settings as AnySettings
from llmkit_attention.blocks import copy_blocks
from llmkit_attention.flash.limits import pays, reasons_against
from llmkit_attention.flash.settings import FlashSettings
from llmkit_attention.host import HostBlocks

if TYPE_CHECKING:
    from llmkit_attention.flash.launch import Launch, TileList
    from llmkit_attention.flash.sharing import Prefixes

QUERIES = 64
"""New tokens that a prefill program takes at a time: as a warpgroup multiplies."""


@dataclass(frozen=True, slots=True)
class _Step:
    """`tiles` of rows with several new tokens, as `Launch.list_queries` gives them for pools that are served in pairs
    and for others; empty if there are no such rows.

    `singles` list the keys of single-token rows by kinds of layers; empty if there are no such rows. `shared` says what
    these rows share, of layers where reading that once pays.
    """

    batch: AttentionBatch
    tiles: dict[bool, torch.Tensor]
    singles: dict[Launch, TileList]
    shared: dict[Launch, Prefixes]


class FlashAttention(AttentionBackend):
    """Grouped heads, windows and soft caps, head dimensions 16 to 256, in bfloat16 or float16.

    Steps of single tokens, and those whose lengths are bounds, launch grids that depend on nothing but the number of
    rows and tokens and `max_seq_len`, read every length and block on the device and allocate only their result: they
    can be captured in a CUDA graph. Rows and tokens that only fill up a captured batch read and store nothing, and what
    they give is arbitrary.
    """

    Settings: ClassVar[type[AnySettings]] = FlashSettings
    preferred_block_size = 64
    copies_blocks = True

    def __init__(self, settings: FlashSettings, *given: Any) -> None:
        super().__init__(settings, *given)
        self.stored_dtype = self.dtype if settings.kv_dtype == "auto" else torch.float8_e4m3fn
        if self.stored_dtype != self.dtype:
            from llmkit.cuda import holds_e4m3

            if not holds_e4m3(self.device):
                raise ConfigError("attention.kv_dtype=fp8 needs a GPU of compute capability 8.9 or higher; choose auto")

    @classmethod
    def check(cls, requirements: AttentionRequirements) -> list[str]:
        return reasons_against(requirements)

    def bytes_per_block(self) -> int:
        per_token = sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.requirements.layers)
        return per_token * self.requirements.block_size * self.stored_dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        # Only here, so that `check` can say that triton is missing where it is.
        from llmkit_attention.flash.launch import Launch, Workspace

        layers, block_size = self.requirements.layers, self.requirements.block_size
        shapes = [(2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim) for spec in layers]
        self._pools = [torch.zeros(shape, dtype=self.stored_dtype, device=self.device) for shape in shapes]
        workspace = Workspace(layers, self.device)
        launches = {spec: Launch(spec, block_size, workspace) for spec in dict.fromkeys(layers)}
        self._launches = [launches[spec] for spec in layers]
        self._seen = [launch.pool(pool) for launch, pool in zip(self._launches, self._pools, strict=True)]
        self._listings = {pool.in_pairs: launch for launch, pool in zip(self._launches, self._seen, strict=True)}
        self._tilings = list({launch.tiling: launch for launch in self._launches}.values())

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        copy_blocks([pool.view(torch.uint8) for pool in self._pools], copies)

    def allocate_host(self, num_blocks: int) -> bool:
        self._host = HostBlocks([pool.view(torch.uint8) for pool in self._pools], num_blocks)
        return True

    def save_blocks(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        self._host.save(blocks, host_blocks)

    def restore_blocks(self, host_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        self._host.restore(host_blocks, blocks)

    def capturable(self, batch: AttentionBatch) -> bool:
        return self.device.type == "cuda" and (batch.max_query_len == 1 or batch.lens_are_bounds)

    def reads_once(self, num_repeated_keys: int) -> bool:
        return any(pays(spec, num_repeated_keys, self.stored_dtype.itemsize) for spec in self.requirements.layers)

    def plan(self, batch: AttentionBatch) -> None:
        has_singles = batch.lens_are_bounds or 1 in batch.query_lens
        singles, shared = self._plan_singles(batch) if has_singles else ({}, {})
        tiles = {}
        if batch.max_query_len > 1:
            tiles = {kind: launch.list_queries(batch, QUERIES, kind) for kind, launch in self._listings.items()}
        self._step = _Step(batch, tiles, singles, shared)

    def _plan_singles(self, batch: AttentionBatch) -> tuple[dict[Launch, TileList], dict[Launch, Prefixes]]:
        from llmkit_attention.flash.sharing import find

        found, lists = {}, {}
        for launch in self._tilings:
            if pays(launch.spec, batch.num_repeated_keys, self.stored_dtype.itemsize):
                found[launch.tiling] = find(launch, batch)
            depths = found[launch.tiling].depths if launch.tiling in found else None
            lists[launch.tiling] = launch.list_tiles(batch, depths)
        launches = dict.fromkeys(self._launches)
        singles = {launch: lists[launch.tiling] for launch in launches}
        return singles, {launch: found[launch.tiling] for launch in launches if launch.tiling in found}

    def slots(self, layer: int) -> KeyValueSlots:
        pool = self._seen[layer]
        return KeyValueSlots(pool.keys, pool.values, self._step.batch.slot_mapping)

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self._launches[layer].write(key, value, self.slots(layer))
        return self.attend(layer, query)

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        pool, launch, step = self._seen[layer], self._launches[layer], self._step
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if step.tiles:
            launch.prefill(query, pool, out, step.tiles[pool.in_pairs], QUERIES, step.batch)
        if step.singles:
            shared = step.shared.get(launch)
            own = shared.own if shared is not None else None
            launch.decode(query, pool, out, step.singles[launch], step.batch, own)
            if shared is not None:
                shared.merge(launch, query, pool, out, step.batch)
        return out
