"""Launches the kernels for one kind of layer: tile sizes, grids and the number of splits."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llmkit.interfaces.attention import AttentionBatch, LayerSpec
from llmkit_attention.flash.decode import attend_one, combine
from llmkit_attention.flash.prefill import attend_many
from llmkit_attention.flash.store import write_kv

MAX_PROGRAMS = 2048
"""Above so many (row, KV head) pairs no row is split; below, splits fill up to it."""
MAX_SPLITS = 64
KEYS_PER_SPLIT = 256
"""A row is not cut into splits smaller than this (by the bound on its length)."""


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number` (> 0)."""
    return 1 << (number - 1).bit_length()


def num_splits(num_rows: int, num_kv_heads: int, max_seq_len: int) -> int:
    """Splits of every row's keys, a power of two; depends on host numbers only, so that a captured grid stays right.

    `max_seq_len` counts rounded up to a power of two: batches of one bucket get one grid.
    """
    room = MAX_PROGRAMS // (num_rows * num_kv_heads)
    wanted = power_of_two(max(max_seq_len, 1)) // KEYS_PER_SPLIT
    splits = max(1, min(room, wanted, MAX_SPLITS))
    return 1 << (splits.bit_length() - 1)


class Workspace:
    """Results of splits before they are combined, float32, shared by all layers and never reallocated."""

    def __init__(self, layers: Iterable[LayerSpec], device: torch.device) -> None:
        specs = list(layers)
        groups = [spec.num_heads // spec.num_kv_heads for spec in specs]
        sizes = [group * spec.head_dim for group, spec in zip(groups, specs, strict=True)]
        self.partial = torch.empty(MAX_PROGRAMS * max(sizes), dtype=torch.float32, device=device)
        self.lse = torch.empty(MAX_PROGRAMS * max(groups), dtype=torch.float32, device=device)


class Launch:
    """The kernels of one `LayerSpec`. Pools are [2, num_blocks, num_kv_heads, block_size, head_dim]."""

    def __init__(self, spec: LayerSpec, block_size: int, workspace: Workspace) -> None:
        self.spec, self.block_size, self.workspace = spec, block_size, workspace
        self.group = spec.num_heads // spec.num_kv_heads
        self.dim_pad = power_of_two(spec.head_dim)
        self.tile = 64 if self.dim_pad <= 128 else 32

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, pool: torch.Tensor) -> None:
        """Store `key` and `value` [N, num_kv_heads, head_dim] at `slots` int64 [N]; negative ones are left out."""
        spec = self.spec
        write_kv[(len(slots),)](
            key, value, slots, pool[0], pool[1], *key.stride(), *value.stride(),
            HEADS=spec.num_kv_heads, DIM=spec.head_dim, PAGE=self.block_size,
            HEADS_PAD=power_of_two(spec.num_kv_heads), DIM_PAD=self.dim_pad,
        )  # fmt: skip

    def decode(self, query: torch.Tensor, pool: torch.Tensor, out: torch.Tensor, batch: AttentionBatch) -> None:
        """Fill `out` [N, num_heads, head_dim] for rows with one new token; other rows are left alone."""
        spec, rows = self.spec, len(batch.seq_lens)
        splits = num_splits(rows, spec.num_kv_heads, batch.max_seq_len)
        partial, lse = self.workspace.partial, self.workspace.lse
        attend_one[(rows, spec.num_kv_heads, splits)](
            query, pool[0], pool[1], out, partial, lse, *self._rows(batch), *query.stride(), *self._logits(),
            HEADS=spec.num_kv_heads, GROUP=self.group, DIM=spec.head_dim, PAGE=self.block_size, TILE=self.tile,
            ROWS_PAD=max(16, power_of_two(self.group)), DIM_PAD=self.dim_pad, SPLITS=splits,
            WINDOW=spec.window is not None, SOFTCAP=spec.softcap is not None, num_warps=4, num_stages=3,
        )  # fmt: skip
        if splits > 1:
            combine[(rows, spec.num_heads)](
                out, partial, lse, batch.query_start_loc, HEADS=spec.num_heads, DIM=spec.head_dim,
                DIM_PAD=self.dim_pad, SPLITS=splits, SPLITS_PAD=splits, num_warps=4,
            )  # fmt: skip

    def prefill(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        out: torch.Tensor,
        tiles: torch.Tensor,
        queries: int,
        batch: AttentionBatch,
    ) -> None:
        """Fill `out` [N, num_heads, head_dim] for the `tiles` int32 [T, 2] of `queries` new tokens each."""
        spec = self.spec
        attend_many[(spec.num_heads, len(tiles))](
            query, pool[0], pool[1], out, tiles, *self._rows(batch), *query.stride(), *self._logits(),
            HEADS=spec.num_kv_heads, GROUP=self.group, DIM=spec.head_dim, PAGE=self.block_size, TILE=self.tile,
            QUERIES=queries, DIM_PAD=self.dim_pad, WINDOW=spec.window is not None, SOFTCAP=spec.softcap is not None,
            num_warps=4, num_stages=3,
        )  # fmt: skip

    def _rows(self, batch: AttentionBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        return batch.query_start_loc, batch.seq_lens, batch.block_table, batch.block_table.stride(0)

    def _logits(self) -> tuple[float, float, int]:
        return self.spec.scale, self.spec.softcap or 1.0, self.spec.window or 0
