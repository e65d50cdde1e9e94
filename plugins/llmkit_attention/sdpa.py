"""Paged attention through torch's `scaled_dot_product_attention`, on CPU and CUDA, for every block layout.

Rows of a step are grouped by query length (all decodes are one group); each group gathers its blocks and attends in one
batched call per layer. Query heads that share a KV head are packed beside each other as extra query rows, so keys and
values are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from llmkit import BlockCopy
from llmkit.interfaces.attention import AttentionBackend, AttentionBatch, AttentionRequirements, LayerSpec
from llmkit_attention.blocks import copy_blocks
from llmkit_attention.host import HostBlocks

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(slots=True)
class _Group:
    """Rows attended together. Q is the longest query of the group, S the longest key sequence in whole blocks."""

    query_index: torch.Tensor | None
    out_index: torch.Tensor | None
    out_select: torch.Tensor | None
    block_index: torch.Tensor
    num_rows: int
    query_len: int
    masks: dict[tuple[int | None, int], torch.Tensor]


class SdpaAttention(AttentionBackend):
    """Correct everywhere, fast on CPU; KV pool [num_blocks, block_size, num_kv_heads, head_dim] per layer."""

    copies_blocks = True

    @classmethod
    def check(cls, requirements: AttentionRequirements) -> list[str]:
        reasons = [] if requirements.dtype in DTYPES else [f"dtype {requirements.dtype} is not one of {DTYPES}"]
        return reasons + [
            f"{layer.num_heads} query heads do not divide into {layer.num_kv_heads} KV heads"
            for layer in set(requirements.layers)
            if layer.num_heads % layer.num_kv_heads
        ]

    def bytes_per_block(self) -> int:
        per_token = sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.requirements.layers)
        return per_token * self.requirements.block_size * self.dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        block_size = self.requirements.block_size
        self._pools = [
            torch.zeros(
                2, num_blocks, block_size * layer.num_kv_heads * layer.head_dim, dtype=self.dtype, device=self.device
            )
            for layer in self.requirements.layers
        ]
        self._mask_kinds = {(layer.window, layer.num_heads // layer.num_kv_heads) for layer in self.requirements.layers}

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        copy_blocks(self._pools, copies, self.requirements.block_size)

    def allocate_host(self, num_blocks: int) -> bool:
        self._host = HostBlocks(self._pools, num_blocks)
        return True

    def save_blocks(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        self._host.save(blocks, host_blocks)

    def restore_blocks(self, host_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        self._host.restore(host_blocks, blocks)

    def plan(self, batch: AttentionBatch) -> None:
        self._slots, self._fresh_blocks = batch.slot_mapping, batch.fresh_blocks
        self._groups = [self._plan_group(batch, rows) for rows in _group_rows(batch.query_lens)]

    def _plan_group(self, batch: AttentionBatch, rows: list[int]) -> _Group:
        query_len = max(batch.query_lens[row] for row in rows)
        num_blocks = -(-max(batch.host_seq_lens[row] for row in rows) // self.requirements.block_size)
        if len(rows) == len(batch.query_lens):
            block_table, seq_lens, first = batch.block_table, batch.seq_lens.long(), batch.query_start_loc[:-1]
        else:
            index = torch.tensor(rows, device=self.device)
            block_table, seq_lens = batch.block_table[index], batch.seq_lens[index].long()
            first = batch.query_start_loc[:-1][index]
        group = _Group(None, None, None, block_table[:, :num_blocks].reshape(-1).long(), len(rows), query_len, {})
        if len(rows) == len(batch.query_lens) and query_len == 1:
            positions = seq_lens[:, None] - 1
        else:
            positions = self._pack(group, first, seq_lens, torch.tensor([batch.query_lens[row] for row in rows]))
        num_keys = num_blocks * self.requirements.block_size
        group.masks = {kind: self._mask(positions, num_keys, *kind) for kind in self._mask_kinds}
        return group

    def _pack(
        self, group: _Group, first: torch.Tensor, seq_lens: torch.Tensor, query_lens: torch.Tensor
    ) -> torch.Tensor:
        """Indices that pad the group's queries to one length and undo it; returns their positions [rows, Q]."""
        query_lens = query_lens.to(self.device)
        offsets = torch.arange(group.query_len, device=self.device)
        is_real = offsets < query_lens[:, None]
        packed = torch.where(is_real, first[:, None] + offsets, 0)
        group.query_index, group.out_index, group.out_select = packed.flatten(), packed[is_real], is_real.flatten()
        return torch.where(is_real, (seq_lens - query_lens)[:, None] + offsets, 0)

    def _mask(self, positions: torch.Tensor, num_keys: int, window: int | None, ratio: int) -> torch.Tensor:
        """Additive mask of packed queries [rows, 1, ratio * Q, num_keys], or 1 for ratio * Q if Q is 1.

        Padding queries stand at position 0 and see key 0.
        """
        keys = torch.arange(num_keys, device=self.device)
        visible = keys <= positions[:, :, None]
        if window is not None:
            visible &= keys > positions[:, :, None] - window
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)
        return mask if positions.shape[1] == 1 else mask.repeat(1, 1, ratio, 1)

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        spec, pool = self.requirements.layers[layer], self._pools[layer]
        shape = (-1, spec.num_kv_heads, spec.head_dim)
        if self._fresh_blocks is not None:
            pool.index_fill_(1, self._fresh_blocks, 0.0)
        pool[0].view(shape).index_copy_(0, self._slots, key)
        pool[1].view(shape).index_copy_(0, self._slots, value)
        if len(self._groups) == 1 and self._groups[0].query_index is None:
            return self._attend(spec, pool, self._groups[0], query).reshape(query.shape)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in self._groups:
            context = self._attend(spec, pool, group, query if group.query_index is None else query[group.query_index])
            out[group.out_index] = context.reshape(-1, *query.shape[1:])[group.out_select]
        return out

    def _attend(self, spec: LayerSpec, pool: torch.Tensor, group: _Group, query: torch.Tensor) -> torch.Tensor:
        """`query` [rows * Q, H, D] -> [rows, Q, H, D]."""
        rows, length, ratio = group.num_rows, group.query_len, spec.num_heads // spec.num_kv_heads
        shape = (rows, -1, spec.num_kv_heads, spec.head_dim)
        key = pool[0].index_select(0, group.block_index).view(shape).transpose(1, 2)
        value = pool[1].index_select(0, group.block_index).view(shape).transpose(1, 2)
        grouped = query.reshape(rows, length, spec.num_kv_heads, ratio, spec.head_dim)
        packed = grouped.permute(0, 2, 3, 1, 4).reshape(rows, spec.num_kv_heads, ratio * length, spec.head_dim)
        mask = group.masks[spec.window, ratio]
        if spec.softcap is None:
            context = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=spec.scale)
        else:
            context = _softcapped(packed, key, value, mask, spec.scale, spec.softcap)
        unpacked = context.view(rows, spec.num_kv_heads, ratio, length, spec.head_dim)
        return unpacked.permute(0, 3, 1, 2, 4).reshape(rows, length, spec.num_heads, spec.head_dim)


def _softcapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """softmax(softcap * tanh(scale * q k / softcap)) v, the Gemma 2 form; the softmax in at least float32."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap + mask
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype), value)


def _group_rows(query_lens: tuple[int, ...]) -> list[list[int]]:
    """Rows by query length, in classes of powers of two, so that padding at most doubles the work."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(query_lens):
        groups.setdefault((length - 1).bit_length(), []).append(row)
    return list(groups.values())
