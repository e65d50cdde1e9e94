"""flash-attn, flashinfer and torch's `varlen_attn` as their documentation says they are called, in plain torch.

Each refuses what the real one would: other types, shapes and page sizes. Results are those of `sequences.dense`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.interfaces.attention import LayerSpec
from tests.attention.sequences import dense


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module `name` that can be found and imported until the test ends."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def attend(
    query: Tensor,
    pools: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    query_starts: Sequence[int],
    tables: Sequence[Sequence[int]],
    spec: LayerSpec,
) -> Tensor:
    """Rows of packed `query` [N, H, D] over pages [P, page, Hkv, D], by each row's number of keys and pages."""
    out = torch.full_like(query, float("nan"))
    for row, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        here = slice(query_starts[row], query_starts[row + 1])
        keys, values = (pool[list(table)].flatten(0, 1)[:length] for pool in pools)
        assert len(keys) == length, "pages are missing"
        out[here] = dense(spec, query[here], keys, values).to(query.dtype) if length else 0.0
    return out


def spec_of(query: Tensor, pool: Tensor, scale: float, window: int, softcap: float) -> LayerSpec:
    """A layer by what kernels are told; `window` counts the keys in front of a query's own, -1 for all."""
    heads, kv_heads, head_dim = query.shape[-2], pool.shape[2], pool.shape[3]
    assert query.stride(-1) == pool.stride(-1) == 1 and query.shape[-1] == head_dim
    return LayerSpec(heads, kv_heads, head_dim, scale, None if window < 0 else window + 1, softcap or None)


def is_int32(*tensors: Tensor) -> None:
    assert all(tensor.dtype is torch.int32 and tensor.stride(-1) == 1 for tensor in tensors)


def flash_attn_2(page: int = 256) -> dict[str, Any]:
    """`flash_attn`, version 2: pages of multiples of 256; `page` replaces that number."""

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor,
        softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
    ) -> Tensor:  # fmt: skip
        rows, length = q.shape[:2]
        assert (
            causal and length == 1 and k_cache.shape[1] % page == 0 and window_size in ((-1, -1), (window_size[0], 0))
        )
        is_int32(cache_seqlens, block_table)
        spec = spec_of(q, k_cache, softmax_scale, window_size[0], softcap)
        tables, lengths = block_table.tolist(), cache_seqlens.tolist()
        return attend(q[:, 0], (k_cache, v_cache), lengths, range(rows + 1), tables, spec)[:, None]

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
        block_table: Tensor,
    ) -> Tensor:  # fmt: skip
        assert causal and k.shape[1] % page == 0
        is_int32(cu_seqlens_q, cu_seqlens_k, block_table)
        lengths = cu_seqlens_k.diff().tolist()
        assert max(cu_seqlens_q.diff().tolist()) <= max_seqlen_q and max(lengths) <= max_seqlen_k
        spec = spec_of(q, k, softmax_scale, window_size[0], softcap)
        return attend(q, (k, v), lengths, cu_seqlens_q.tolist(), block_table.tolist(), spec)

    return {
        "flash_attn_with_kvcache": flash_attn_with_kvcache,
        "flash_attn_varlen_func": flash_attn_varlen_func,
    }


def flash_attn_3() -> dict[str, Any]:
    """`flash_attn_interface`: one call for packed rows of any length, pages of any size."""

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, page_table: Tensor, cu_seqlens_q: Tensor,
        max_seqlen_q: int, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
    ) -> Tensor:  # fmt: skip
        assert causal and max(cu_seqlens_q.diff().tolist()) <= max_seqlen_q
        is_int32(cache_seqlens, page_table, cu_seqlens_q)
        spec = spec_of(q, k_cache, softmax_scale, window_size[0], softcap)
        lengths, tables = cache_seqlens.tolist(), page_table.tolist()
        return attend(q, (k_cache, v_cache), lengths, cu_seqlens_q.tolist(), tables, spec)

    return {"flash_attn_with_kvcache": flash_attn_with_kvcache}


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
) -> Tensor:  # fmt: skip
    """torch's, from 2.13 on."""
    assert cu_seq_k is None and window_size[1] == 0 and max(seqused_k.tolist()) <= max_k
    assert enable_gqa or query.shape[1] == key.shape[2]
    assert max(cu_seq_q.diff().tolist()) <= max_q
    is_int32(cu_seq_q, seqused_k, block_table)
    spec = spec_of(query, key, scale, window_size[0], 0.0)
    return attend(query, (key, value), seqused_k.tolist(), cu_seq_q.tolist(), block_table.tolist(), spec)


class _Wrapper:
    """FlashInfer's: what is planned holds for every `run` until the next plan."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str, use_tensor_cores: bool = False) -> None:
        assert float_workspace_buffer.dtype is torch.uint8 and kv_layout == "NHD"

    def _plan(
        self, starts: Tensor, indptr: Tensor, indices: Tensor, last: Tensor, heads: tuple[int, ...], *, sm_scale: float,
        window_left: int, logits_soft_cap: float, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        is_int32(starts, indptr, indices, last)
        num_heads, num_kv_heads, head_dim, self.page = heads
        assert len(indices) == indptr[-1] and ((last >= 1) & (last <= self.page)).all()
        self.dtypes, self.starts = (q_data_type, kv_data_type), starts.tolist()
        ends = indptr.tolist()
        self.tables = [indices[start:end].tolist() for start, end in pairwise(ends)]
        self.lengths = [(len(table) - 1) * self.page + int(rest) for table, rest in zip(self.tables, last, strict=True)]
        window = None if window_left < 0 else window_left + 1
        self.spec = LayerSpec(num_heads, num_kv_heads, head_dim, sm_scale, window, logits_soft_cap or None)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = paged_kv_cache
        assert (q.dtype, keys.dtype) == self.dtypes and q.is_contiguous()
        assert keys.shape[1:] == (self.page, self.spec.num_kv_heads, self.spec.head_dim)
        return attend(q, (keys, values), self.lengths, self.starts, self.tables, self.spec)


class _Decode(_Wrapper):
    def plan(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, *heads: int, **options: Any) -> None:
        starts = torch.arange(len(indptr), dtype=torch.int32)
        self._plan(starts, indptr, indices, last_page_len, heads, **options)


class _Prefill(_Wrapper):
    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        *heads: int, causal: bool, **options: Any,
    ) -> None:  # fmt: skip
        assert causal
        self._plan(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, heads, **options)


FLASHINFER = {"BatchDecodeWithPagedKVCacheWrapper": _Decode, "BatchPrefillWithPagedKVCacheWrapper": _Prefill}
