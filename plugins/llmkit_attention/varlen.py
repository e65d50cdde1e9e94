"""Attention by torch's own `varlen_attn`, from the version on that takes a block table (2.13)."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from llmkit.interfaces.attention import AttentionBatch, AttentionRequirements
from llmkit_attention.pages import PagedBackend, reasons_against

HEAD_DIMS = range(8, 257, 8)
PAGE = 256


class VarlenAttention(PagedBackend):
    """Grouped heads and windows, no soft caps."""

    preferred_block_size = PAGE

    @classmethod
    def check(cls, requirements: AttentionRequirements) -> list[str]:
        missing = []
        if _varlen_attn() is None:
            missing.append(f"torch {torch.__version__}: varlen_attn takes no block_table (2.13 and later do)")
        if requirements.block_size % PAGE:
            missing.append(f"block size {requirements.block_size} is not a multiple of {PAGE}")
        missing += [f"soft cap {cap}" for cap in sorted({s.softcap for s in requirements.layers if s.softcap})]
        return reasons_against(requirements, missing, HEAD_DIMS)

    def capturable(self, batch: AttentionBatch) -> bool:
        return self.device.type == "cuda" and batch.max_query_len == 1

    def plan(self, batch: AttentionBatch) -> None:
        self._batch, self._slots = batch, self.real_slots(batch.slot_mapping)

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        spec, batch = self.requirements.layers[layer], self._batch
        keys, values = self.store(layer, self._slots, key, value)
        attend: Any = _varlen_attn()
        out: torch.Tensor = attend(
            query,
            keys,
            values,
            batch.query_start_loc,
            None,
            batch.max_query_len,
            batch.max_seq_len,
            scale=spec.scale,
            window_size=(-1 if spec.window is None else spec.window - 1, 0),
            enable_gqa=spec.num_heads != spec.num_kv_heads,
            seqused_k=batch.seq_lens,
            block_table=batch.block_table,
        )
        return out.contiguous()


def _varlen_attn() -> Any:
    """torch's function if it takes a block table, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "block_table" in inspect.signature(varlen_attn).parameters else None
