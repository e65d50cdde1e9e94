"""Attention by the flash-attn package: FlashAttention-3 (`flash_attn_interface`) if it is there, else FlashAttention-2.

Lengths and pages are read on the device, so steps of single tokens can be captured in CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional as F

from llmkit.interfaces.attention import AttentionBatch, AttentionRequirements
from llmkit_attention.pages import PagedBackend, reasons_against

HEAD_DIMS = range(8, 257, 8)
PAGE = 256
"""FlashAttention-2 takes pages of multiples of this, FlashAttention-3 any."""
VERSIONS = {"flash_attn_interface": 3, "flash_attn": 2}


@dataclass(frozen=True, slots=True)
class _Step:
    """`slots` int64 [N] of new tokens, `key_starts` int32 [R + 1] of rows in all their keys."""

    batch: AttentionBatch
    slots: torch.Tensor
    key_starts: torch.Tensor


class FlashAttnAttention(PagedBackend):
    """Grouped heads, windows, soft caps; head dimensions to 256."""

    preferred_block_size = PAGE

    @classmethod
    def check(cls, requirements: AttentionRequirements) -> list[str]:
        module = _module()
        missing = [] if module else ["flash-attn is not installed (no module flash_attn or flash_attn_interface)"]
        if module == "flash_attn" and requirements.block_size % PAGE:
            missing.append(
                f"block size {requirements.block_size} is not a multiple of {PAGE}, as FlashAttention-2 asks"
            )
        return reasons_against(requirements, missing, HEAD_DIMS)

    def allocate(self, num_blocks: int) -> None:
        super().allocate(num_blocks)
        name = _module()
        self._kernels: Any = import_module(name)
        self._version = VERSIONS[name]

    def capturable(self, batch: AttentionBatch) -> bool:
        return self.device.type == "cuda" and batch.max_query_len == 1

    def plan(self, batch: AttentionBatch) -> None:
        key_starts = F.pad(batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        self._step = _Step(batch, self.real_slots(batch.slot_mapping), key_starts)

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        spec, batch = self.requirements.layers[layer], self._step.batch
        keys, values = self.store(layer, self._step.slots, key, value)
        window = (-1, -1) if spec.window is None else (spec.window - 1, 0)
        options = {"softmax_scale": spec.scale, "causal": True, "window_size": window, "softcap": spec.softcap or 0.0}
        if self._version == 3:
            attend = partial(
                self._kernels.flash_attn_with_kvcache,
                page_table=batch.block_table,
                cu_seqlens_q=batch.query_start_loc,
                max_seqlen_q=batch.max_query_len,
                cache_seqlens=batch.seq_lens,
            )
            out = attend(query, keys, values, **options)
        elif batch.max_query_len == 1:
            options |= {"cache_seqlens": batch.seq_lens, "block_table": batch.block_table}
            out = self._kernels.flash_attn_with_kvcache(query[:, None], keys, values, **options).squeeze(1)
        else:
            starts = (batch.query_start_loc, self._step.key_starts, batch.max_query_len, batch.max_seq_len)
            out = self._kernels.flash_attn_varlen_func(
                query, keys, values, *starts, block_table=batch.block_table, **options
            )
        context: torch.Tensor = out.contiguous()
        return context


def _module() -> str:
    """The newest installed module of kernels; empty if there is none."""
    return next((name for name in VERSIONS if find_spec(name) is not None), "")
