"""Launches the kernels for one kind of layer: tile sizes, grids and the number of splits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from llmkit.cuda import is_hopper, overlap
from llmkit.interfaces.attention import AttentionBatch, KeyValueSlots, LayerSpec
from llmkit_attention.flash.decode import attend_one, list_tiles
from llmkit_attention.flash.prefill import attend_many, list_queries
from llmkit_attention.flash.prefill_list import list_longest_first
from llmkit_attention.flash.store import write_kv

PROGRAMS_PER_PROCESSOR = 2
"""Decode programs that run on a multiprocessor at the same time; their shared memory leaves no room
for programs of the next kernel, which would crowd out some of these."""
STAGES = 4
"""Tiles of a decode program that are loaded or in use at the same time."""
HOPPER_STAGES, HOPPER_REGISTERS = {2: 3, 1: 4}, 128
"""The same for the kernel on Hopper, by the bytes of a stored number, and the registers of a thread that leave room for
two programs."""
FEW_ROWS, FEW_STAGES = 16, 4
"""Up to so many rows there is one of them a multiprocessor: fewer have to start, and fewer parts to be combined. Not of
those that have keys in e4m3 to copy, which are slow alone."""
LEAST_TILES = 2
"""A share is not smaller: parts of a row must be combined again."""
QUERY_WARPS, QUERY_STAGES = 4, 3
PAIR_STAGES, PAIR_HELD, PAIR_REGISTERS = 2, 2, 240
"""The prefill kernel on Hopper: tiles of keys and of values, and pairs of query tiles, that have room, and the
registers of a thread that multiplies."""
MAX_TOKENS = 1 << 17
"""A tile's code has so many places for tokens."""
CHUNK = 128
"""Tiles that a program lists at a time."""
SORTED_CHUNK, SORTED_ROWS = 32, 128
"""Tiles that a program lists longest first at a time, and rows that it compares them with at a time."""


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number` (> 0)."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class TileList:
    """The tiles of a step's single-token rows on the device, int32; see `decode`."""

    owners: torch.Tensor
    codes: torch.Tensor
    pages: torch.Tensor
    ends: torch.Tensor
    arrivals: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pool:
    """A layer's keys and values [num_blocks, num_kv_heads, block_size, head_dim], and both as `Launch.pool` sees them:
    rows of which a kernel takes a tile by one bulk copy, or the tensors themselves where it cannot."""

    keys: torch.Tensor
    values: torch.Tensor
    key_tiles: TensorDescriptor | torch.Tensor
    value_tiles: TensorDescriptor | torch.Tensor
    boxes: tuple[Any, ...] | None
    """Descriptors as `decode_hopper` takes them: tiles of keys and of values, parts of keys and of values."""
    in_pairs: bool
    """Whether prompts are served two query heads at a time, by `prefill_hopper`."""


class Workspace:
    """Parts of rows before they are combined, float32, shared by all layers and never reallocated."""

    def __init__(self, layers: Iterable[LayerSpec], device: torch.device) -> None:
        self.device = device
        specs = list(layers)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        self.programs = processors * PROGRAMS_PER_PROCESSOR
        rows = [self.shares(spec) * spec.num_kv_heads * 2 * group_pad(spec) for spec in specs]
        sizes = [number * spec.head_dim for number, spec in zip(rows, specs, strict=True)]
        self.partial = torch.empty(max(sizes), dtype=torch.float32, device=device)
        self.lse = torch.empty(max(rows), dtype=torch.float32, device=device)

    def shares(self, spec: LayerSpec) -> int:
        """Programs for each KV head: all of them run at once, and even multiples of 8 rows divide evenly."""
        shares = self.programs // spec.num_kv_heads
        return shares - shares % 8 if shares > 8 else max(1, shares)


def group_pad(spec: LayerSpec) -> int:
    """Query heads of a KV head, padded to what a tensor core takes."""
    return max(16, power_of_two(spec.num_heads // spec.num_kv_heads))


class Launch:
    """The kernels of one `LayerSpec`. Pools are [2, num_blocks, num_kv_heads, block_size, head_dim]."""

    def __init__(self, spec: LayerSpec, block_size: int, workspace: Workspace) -> None:
        self.spec, self.block_size, self.workspace = spec, block_size, workspace
        self.group = spec.num_heads // spec.num_kv_heads
        self.dim_pad = power_of_two(spec.head_dim)
        self.tile = 64 if self.dim_pad <= 128 else 32
        self.bulk = block_size >= self.tile and spec.head_dim == self.dim_pad
        self.hopper = self.bulk and spec.head_dim in (64, 128) and is_hopper(workspace.device)
        self.overlap = overlap(workspace.device)
        self.tiling = (spec.window, spec.num_heads, spec.num_kv_heads, spec.head_dim)

    def pool(self, pool: torch.Tensor) -> Pool:
        """`pool` [2, num_blocks, num_kv_heads, block_size, head_dim] in the form that the other methods take."""
        keys, values = pool
        boxes = self._boxes(keys, values) if self.hopper else None
        in_pairs = boxes is not None and self.group % 2 == 0 and pool.itemsize == 2
        return Pool(keys, values, self._tiles(keys), self._tiles(values), boxes, in_pairs)

    def _tiles(self, part: torch.Tensor) -> TensorDescriptor | torch.Tensor:
        if not self.bulk:
            return part
        return TensorDescriptor.from_tensor(part.view(-1, self.spec.head_dim), [self.tile, self.spec.head_dim])

    def _boxes(self, *parts: torch.Tensor) -> tuple[Any, ...]:
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from llmkit_attention.flash.decode_hopper import PART

        rows, size = [part.view(-1, self.spec.head_dim) for part in parts], parts[0].itemsize
        panel = min(128 // size, self.spec.head_dim)
        layout = NVMMASharedLayout(panel * size, 8 * size, rank=2)
        shapes = [self.tile, panel], [PART.value, panel]
        return tuple(TensorDescriptor.from_tensor(part, shape, layout) for shape in shapes for part in rows)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: KeyValueSlots) -> None:
        """Store `key` and `value` [N, num_kv_heads, head_dim] in their slots."""
        spec = self.spec
        write_kv[(len(key),)](
            key, value, slots.slot_mapping, slots.keys, slots.values, *key.stride(), *value.stride(),
            HEADS=spec.num_kv_heads, DIM=spec.head_dim, PAGE=self.block_size,
            HEADS_PAD=power_of_two(spec.num_kv_heads), DIM_PAD=self.dim_pad, **self.overlap,
        )  # fmt: skip

    def list_tiles(self, batch: AttentionBatch, depths: torch.Tensor | None = None) -> TileList:
        """The tiles of the batch's single-token rows, listed on the device; the same for all layers of one `tiling`.

        Row r leaves out its first `depths[r]` tiles.
        """
        assert len(batch.positions) < MAX_TOKENS, f"{len(batch.positions)} tokens in a step, at most {MAX_TOKENS - 1}"
        rows, device = len(batch.seq_lens), batch.seq_lens.device
        most = rows * -(-batch.max_seq_len // self.tile)
        pages = max(1, self.tile // self.block_size)
        owners, codes, listed = (torch.empty(most * width, dtype=torch.int32, device=device) for width in (1, 1, pages))
        ends, arrivals = (
            torch.empty(rows * width, dtype=torch.int32, device=device) for width in (1, self.spec.num_kv_heads)
        )
        list_tiles[(rows,)](
            *self.rows(batch), depths if depths is not None else owners, owners, codes, listed, ends, arrivals, rows,
            self.spec.window or 0, HEADS=self.spec.num_kv_heads, PAGE=self.block_size, TILE=self.tile,
            ROWS_PAD=power_of_two(rows), CHUNK=CHUNK, WINDOW=self.spec.window is not None, SHARED=depths is not None,
            num_warps=4,
        )  # fmt: skip
        return TileList(owners, codes, listed, ends, arrivals)

    def decode(
        self,
        query: torch.Tensor,
        pool: Pool,
        out: torch.Tensor,
        tiles: TileList,
        batch: AttentionBatch,
        own: torch.Tensor | None = None,
    ) -> None:
        """Fill `out` [N, num_heads, head_dim] for the rows of `tiles`, and `own` [N, num_heads], float32, with their
        log-sum-exps in base 2; other rows are left alone."""
        spec, workspace, shares = self.spec, self.workspace, self.workspace.shares(self.spec)
        if pool.boxes is not None:
            self._decode_hopper(query, pool.boxes, out, tiles, batch, own)
            return
        attend_one[(shares, spec.num_kv_heads)](
            query, pool.keys, pool.values, out, own if own is not None else workspace.lse, workspace.partial,
            workspace.lse, batch.query_start_loc, tiles.owners, tiles.codes, tiles.pages, tiles.ends, tiles.arrivals,
            len(batch.seq_lens), *query.stride(), spec.scale, spec.softcap or 1.0,
            HEADS=spec.num_kv_heads, GROUP=self.group, DIM=spec.head_dim, PAGE=self.block_size, TILE=self.tile,
            ROWS_PAD=group_pad(spec), DIM_PAD=self.dim_pad, SHARES=shares, LEAST=LEAST_TILES,
            WINDOW=spec.window is not None, SOFTCAP=spec.softcap is not None, SHARED=own is not None,
            **self.overlap, num_warps=4, num_stages=STAGES,
        )  # fmt: skip

    def _decode_hopper(
        self,
        query: torch.Tensor,
        boxes: tuple[Any, ...],
        out: torch.Tensor,
        tiles: TileList,
        batch: AttentionBatch,
        own: torch.Tensor | None,
    ) -> None:
        from llmkit_attention.flash.decode_hopper import attend_one_hopper

        spec, workspace, rows = self.spec, self.workspace, len(batch.seq_lens)
        size = boxes[0].base.itemsize
        shares, stages = workspace.shares(spec), HOPPER_STAGES[size]
        if rows <= FEW_ROWS and size == 2:
            shares, stages = max(1, shares // PROGRAMS_PER_PROCESSOR), FEW_STAGES
        attend_one_hopper[(shares, spec.num_kv_heads)](
            query, *boxes, out, own if own is not None else workspace.lse, workspace.partial, workspace.lse,
            batch.query_start_loc, tiles.owners, tiles.codes, tiles.pages, tiles.ends, tiles.arrivals,
            rows, *query.stride()[:2], spec.scale, spec.softcap or 1.0,
            HEADS=spec.num_kv_heads, GROUP=self.group, DIM=spec.head_dim, PAGE=self.block_size, TILE=self.tile,
            ROWS_PAD=max(8, power_of_two(self.group)), SHARES=shares, LEAST=LEAST_TILES, STAGES=stages,
            WINDOW=spec.window is not None, SOFTCAP=spec.softcap is not None, SHARED=own is not None,
            **self.overlap, num_warps=4, maxnreg=HOPPER_REGISTERS,
        )  # fmt: skip

    def list_queries(self, batch: AttentionBatch, queries: int, in_pairs: bool) -> torch.Tensor:
        """Tiles of up to `queries` new tokens of rows that have several, listed on the device: int32 [T, 2] of
        `prefill.list_queries`, or, for a pool that is served `in_pairs`, [T + 1, 4] of `prefill_list`."""
        rows = len(batch.seq_lens)
        most = -(-len(batch.positions) // queries) + rows
        if not batch.lens_are_bounds:
            most = sum(-(-length // queries) for length in batch.query_lens if length > 1)
        size = (most + 1, 4) if in_pairs else (most, 2)
        tiles = torch.empty(size, dtype=torch.int32, device=batch.seq_lens.device)
        if in_pairs:
            list_longest_first[(rows,)](
                batch.query_start_loc, batch.seq_lens, tiles, rows, most,
                QUERIES=queries, ROWS=min(SORTED_ROWS, power_of_two(rows)), CHUNK=SORTED_CHUNK,
            )  # fmt: skip
        else:
            list_queries[(rows,)](
                batch.query_start_loc, tiles, rows, most, QUERIES=queries, ROWS_PAD=power_of_two(rows), CHUNK=CHUNK
            )
        return tiles

    def prefill(
        self,
        query: torch.Tensor,
        pool: Pool,
        out: torch.Tensor,
        tiles: torch.Tensor,
        queries: int,
        batch: AttentionBatch,
    ) -> None:
        """Fill `out` [N, num_heads, head_dim] for the `tiles` of `list_queries`; other rows are left alone."""
        spec = self.spec
        if pool.in_pairs and pool.boxes is not None:
            self._prefill_hopper(query, pool.boxes, out, tiles, batch)
            return
        attend_many[(spec.num_heads, len(tiles))](
            query, pool.keys, pool.values, pool.key_tiles, pool.value_tiles, out, tiles, *self.rows(batch),
            *query.stride(), *self._logits(),
            HEADS=spec.num_kv_heads, GROUP=self.group, DIM=spec.head_dim, PAGE=self.block_size, TILE=self.tile,
            QUERIES=queries, DIM_PAD=self.dim_pad, WINDOW=spec.window is not None, SOFTCAP=spec.softcap is not None,
            BULK=self.bulk, num_warps=QUERY_WARPS, num_stages=QUERY_STAGES,
        )  # fmt: skip

    def _prefill_hopper(
        self, query: torch.Tensor, boxes: tuple[Any, ...], out: torch.Tensor, tiles: torch.Tensor, batch: AttentionBatch
    ) -> None:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from llmkit_attention.flash.prefill_hopper import attend_many_hopper
        from llmkit_attention.flash.softmax_hopper import QUERIES

        spec, programs = self.spec, self.workspace.programs // PROGRAMS_PER_PROCESSOR
        # Bulk copies take tokens as rows of all heads, which begin at multiples of 16 bytes.
        if query.stride()[1:] != (spec.head_dim, 1) or query.stride(0) % 8 or query.data_ptr() % 16:
            query = query.clone(memory_format=torch.contiguous_format)
        size, strides = [len(query), spec.num_heads * spec.head_dim], [query.stride(0), 1]
        queries = TensorDescriptor(query, size, strides, [QUERIES.value, spec.head_dim], boxes[0].layout)
        attend_many_hopper[(programs,)](
            queries, *boxes[:2], out, tiles, len(tiles) - 1, batch.block_table, batch.block_table.stride(0),
            *self._logits(),
            HEADS=spec.num_kv_heads, GROUP=self.group, DIM=spec.head_dim, PAGE=self.block_size, PROGRAMS=programs,
            STAGES=PAIR_STAGES, HELD=PAIR_HELD, REGISTERS=PAIR_REGISTERS, WINDOW=spec.window is not None,
            SOFTCAP=spec.softcap is not None, num_warps=4,
        )  # fmt: skip

    def rows(self, batch: AttentionBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Rows as kernels take them."""
        return batch.query_start_loc, batch.seq_lens, batch.block_table, batch.block_table.stride(0)

    def _logits(self) -> tuple[float, float, int]:
        return self.spec.scale, self.spec.softcap or 1.0, self.spec.window or 0
