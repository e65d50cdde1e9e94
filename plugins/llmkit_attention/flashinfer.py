"""Attention by FlashInfer's batch wrappers over paged keys and values.

They plan a step on the host from its exact lengths, so a step waits for the device and none is captured in a graph.
"""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from llmkit.interfaces.attention import AttentionBatch, AttentionRequirements, LayerSpec
from llmkit_attention.pages import PagedBackend, reasons_against

HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 128 << 20
"""What FlashInfer's documentation recommends."""


class FlashInferAttention(PagedBackend):
    """Grouped heads, windows, soft caps; head dimensions 64, 128 and 256."""

    @classmethod
    def check(cls, requirements: AttentionRequirements) -> list[str]:
        missing = [] if find_spec("flashinfer") else ["flashinfer is not installed (pip install flashinfer-python)"]
        if not missing and not _has_kernels():
            missing.append("flashinfer compiles its kernels, and there is neither nvcc nor flashinfer-jit-cache")
        return reasons_against(requirements, missing, HEAD_DIMS)

    def allocate(self, num_blocks: int) -> None:
        super().allocate(num_blocks)
        kernels = import_module("flashinfer")
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        # Layers alike share a plan; decodes of many query heads a KV head are faster on tensor cores.
        self._decodes: dict[LayerSpec, Any] = {}
        self._prefills: dict[LayerSpec, Any] = {}
        for spec in dict.fromkeys(self.requirements.layers):
            is_grouped = spec.num_heads // spec.num_kv_heads > 2
            self._decodes[spec] = kernels.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=is_grouped
            )
            self._prefills[spec] = kernels.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")

    def plan(self, batch: AttentionBatch) -> None:
        self._slots = self.real_slots(batch.slot_mapping)
        block_size, lengths = self.requirements.block_size, batch.seq_lens.cpu()
        num_pages = (lengths + block_size - 1) // block_size
        ends = F.pad(num_pages.cumsum(0, dtype=torch.int32), (1, 0))
        is_page = torch.arange(batch.block_table.shape[1]) < num_pages[:, None]
        pages = batch.block_table[is_page.to(self.device)]
        last = (lengths - 1) % block_size + 1
        self._wrappers = self._decodes if batch.max_query_len == 1 else self._prefills
        # What is planned lies in the wrapper; the workspace is scratch that one `run` after the other may use.
        for spec, wrapper in self._wrappers.items():
            options: dict[str, Any] = {
                "sm_scale": spec.scale,
                "window_left": -1 if spec.window is None else spec.window - 1,
                "logits_soft_cap": spec.softcap or 0.0,
                "q_data_type": self.dtype,
                "kv_data_type": self.dtype,
            }
            heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim, block_size)
            if batch.max_query_len == 1:
                wrapper.plan(ends, pages, last, *heads, **options)
            else:
                wrapper.plan(batch.query_start_loc, ends, pages, last, *heads, causal=True, **options)

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys, values = self.store(layer, self._slots, key, value)
        wrapper = self._wrappers[self.requirements.layers[layer]]
        out: torch.Tensor = wrapper.run(query.contiguous(), (keys, values))
        return out.contiguous()


def _has_kernels() -> bool:
    """Whether kernels can be compiled, or come compiled."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return bool(shutil.which("nvcc") or (home / "bin/nvcc").exists() or find_spec("flashinfer_jit_cache"))
