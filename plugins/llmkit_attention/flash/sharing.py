"""Launches what reads a prefix that several single-token rows share once for all of them (cascade)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.interfaces.attention import AttentionBatch
from llmkit_attention.flash.attend_shared import attend_shared
from llmkit_attention.flash.launch import Launch, Pool, power_of_two
from llmkit_attention.flash.shared import choose_pages, find_prefixes, list_packs

QUERIES = 64
"""Query heads, of one KV head and several rows, that take a tile of keys together: as a warpgroup multiplies."""
LEAST_TILES = 4
"""Tiles that a row's group must save: a part more to merge costs as much."""
MAX_PACKS = 128
"""Rows beyond so many packs read for themselves."""
LEAST_PART = 4
"""Tiles of a part, at least: every part is written and read again."""
STAGES, CHUNK = 3, 128


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What a step's rows share, on the device; int32 but for `own`, `partial` and `lse`, float32. See `shared`."""

    num_shares: int
    depths: torch.Tensor
    members: torch.Tensor
    leaders: torch.Tensor
    reaches: torch.Tensor
    ends: torch.Tensor
    arrivals: torch.Tensor
    own: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor

    def merge(self, launch: Launch, query: torch.Tensor, pool: Pool, out: torch.Tensor, batch: AttentionBatch) -> None:
        """Merge what rows share into `out` [N, num_heads, head_dim], where their own tiles have been attended over."""
        spec = launch.spec
        attend_shared[(self.num_shares, spec.num_kv_heads)](
            query, pool.keys, pool.values, pool.key_tiles, pool.value_tiles, out, self.own, self.partial, self.lse,
            batch.query_start_loc, batch.block_table, batch.block_table.stride(0), self.members, self.leaders,
            self.reaches, self.ends, self.arrivals, *query.stride(), spec.scale, spec.softcap or 1.0,
            HEADS=spec.num_kv_heads, GROUP=launch.group, DIM=spec.head_dim, PAGE=launch.block_size, TILE=launch.tile,
            MEMBERS=_members(launch), QUERIES=_queries(launch), DIM_PAD=launch.dim_pad, PACKS=len(self.reaches),
            SHARES=self.num_shares, SOFTCAP=spec.softcap is not None, BULK=launch.bulk, **launch.overlap,
            num_warps=4 if launch.dim_pad <= 128 else 8, num_stages=STAGES,
        )  # fmt: skip


def find(launch: Launch, batch: AttentionBatch) -> Prefixes:
    """Which rows of `batch` share how many tiles; launches depend on the number of rows only."""
    spec, rows, device = launch.spec, len(batch.seq_lens), batch.seq_lens.device
    heads, queries, members = spec.num_kv_heads, _queries(launch), _members(launch)
    packs = min(MAX_PACKS, power_of_two(max(1, rows // members + rows // 2)))
    shares = launch.workspace.shares(spec)

    def numbers(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    parts = (shares + packs, heads, queries)
    found = Prefixes(
        shares, numbers(rows), numbers(packs, members), numbers(packs), numbers(packs), numbers(packs + 1),
        numbers(packs, heads), numbers(len(batch.positions), spec.num_heads, dtype=torch.float32),
        numbers(*parts, spec.head_dim, dtype=torch.float32), numbers(*parts, dtype=torch.float32),
    )  # fmt: skip
    keys, wholes, leaders, ranks, counts, bases = numbers(6, rows)
    pad = power_of_two(rows)
    choose_pages[(rows,)](
        *launch.rows(batch), keys, wholes, rows, PAGE=launch.block_size, TILE=launch.tile, ROWS_PAD=pad,
        LEVELS=max(1, (batch.max_seq_len // launch.tile).bit_length()), LEAST=LEAST_TILES, num_warps=4,
    )  # fmt: skip
    find_prefixes[(rows,)](
        keys, wholes, batch.block_table, batch.block_table.stride(0), leaders, ranks, counts, found.depths, rows,
        PAGE=launch.block_size, TILE=launch.tile, ROWS_PAD=pad, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    list_packs[(1,)](
        leaders, ranks, counts, found.depths, bases, found.members, found.leaders, found.reaches, found.ends,
        found.arrivals, rows, HEADS=heads, ROWS_PAD=pad, MEMBERS=members, PACKS=packs, SHARES=shares,
        LEAST=LEAST_PART, num_warps=4,
    )  # fmt: skip
    return found


def _queries(launch: Launch) -> int:
    return max(QUERIES, power_of_two(launch.group))


def _members(launch: Launch) -> int:
    """Rows of a pack."""
    return _queries(launch) // launch.group
