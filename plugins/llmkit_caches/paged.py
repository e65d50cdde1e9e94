"""Paged KV cache: any free block serves any request, and full blocks that were computed once serve whoever needs them.

Blocks are free, used (counted by reference) or cached: published, used by nobody, kept until their room is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from llmkit import CacheAllocator, CacheSpec, CacheStats, Request
from llmkit import Settings as AnySettings
from llmkit_caches.eviction import POLICIES
from llmkit_caches.prefix import Prefix, PrefixIndex, chained_hash


class PagedSettings(AnySettings):
    """Options of the paged cache."""

    prefix: bool = Field(True, description="reuse the KV of equal beginnings, within a tenant")
    eviction: Literal["lru", "lfu", "fifo"] = Field("lru", description="which unused cached block makes room first")


class PagedCache(CacheAllocator):
    """Block tables over a free list (Kwon et al. 2023, "PagedAttention"), with prefix caching."""

    Settings: ClassVar[type[AnySettings]] = PagedSettings
    hash_function = staticmethod(chained_hash)

    def __init__(self, settings: PagedSettings, spec: CacheSpec) -> None:
        super().__init__(settings, spec)
        self._free = list(range(spec.num_blocks - 1, -1, -1))
        self._ref_counts = [0] * spec.num_blocks
        self._tables: dict[str, list[int]] = {}
        self._is_on = settings.prefix
        self._index = PrefixIndex(spec.block_size, POLICIES[settings.eviction](), self.hash_function)
        self._num_published: dict[str, int] = {}

    def match(self, request: Request) -> int:
        return len(self._index.find(request)) * self.spec.block_size if self._is_on else 0

    def num_missing_blocks(self, request: Request, upto: int) -> int:
        return self._missing(request, upto, self._reusable(request, upto))

    def allocate(self, request: Request, upto: int) -> bool:
        reusable = self._reusable(request, upto)
        if self._missing(request, upto, reusable) > len(self._free) + self._index.num_idle:
            return False
        table = self._tables.get(request.request_id, [])
        num_blocks = -(-upto // self.spec.block_size)
        if len(table) >= num_blocks:
            return True
        self._tables[request.request_id] = table
        for prefix in reusable:
            self._index.use(prefix)
            self._ref_counts[prefix.blocks[0]] += 1
            table.append(prefix.blocks[0])
        if reusable:
            self._num_published[request.request_id] = len(reusable)
            self._index.forget()
        while len(table) < num_blocks:
            block = self._free.pop() if self._free else self._index.evict()
            self._ref_counts[block] = 1
            table.append(block)
        return True

    def _reusable(self, request: Request, upto: int) -> Sequence[Prefix]:
        """Prefixes whose blocks `request` takes when it starts."""
        if not self._is_on or request.request_id in self._tables:
            return ()
        return self._index.find(request)[: -(-upto // self.spec.block_size)]

    def _missing(self, request: Request, upto: int, reusable: Sequence[Prefix]) -> int:
        num_held = len(self._tables.get(request.request_id, ())) + len(reusable)
        num_new = max(0, -(-upto // self.spec.block_size) - num_held)
        return num_new + sum(prefix.is_idle for prefix in reusable)

    def commit(self, request: Request, num_computed_tokens: int) -> None:
        num_full = num_computed_tokens // self.spec.block_size
        num_published = self._num_published.get(request.request_id, 0)
        if num_full <= num_published or not self._is_on:
            return
        table = self._tables[request.request_id]
        self._free += self._index.publish(request, table, num_published, num_full)
        self._num_published[request.request_id] = num_full

    def truncate(self, request: Request, upto: int) -> None:
        table = self._tables.get(request.request_id, [])
        self._release(table, -(-upto // self.spec.block_size))
        if len(table) < self._num_published.get(request.request_id, 0):
            self._num_published[request.request_id] = len(table)
        if not table:
            self.free(request)

    def free(self, request: Request) -> None:
        self._release(self._tables.pop(request.request_id, []), 0)
        self._num_published.pop(request.request_id, None)

    def _release(self, table: list[int], keep: int) -> None:
        """Give back all but the first `keep` blocks, the last one first: nothing is left behind an unused prefix."""
        while len(table) > keep:
            block = table.pop()
            self._ref_counts[block] -= 1
            if not self._ref_counts[block] and not self._index.release(block):
                self._free.append(block)

    def block_table(self, request: Request) -> Sequence[int]:
        return self._tables.get(request.request_id, ())

    def stats(self) -> CacheStats:
        num_free, num_cached = len(self._free), self._index.num_idle
        return CacheStats(self.spec.num_blocks - num_free - num_cached, num_cached, num_free)

    def census(self) -> dict[int, tuple[str, ...]]:
        owners: dict[int, list[str]] = {}
        for request_id, table in self._tables.items():
            for block in table:
                owners.setdefault(block, []).append(request_id)
        return {block: tuple(ids) for block, ids in owners.items()}

    def check(self) -> None:
        super().check()
        census = self.census()
        for block, count in enumerate(self._ref_counts):
            assert count == len(census.get(block, ())), f"block {block}: {count} references, {census.get(block, ())}"
        assert len(set(self._free)) == len(self._free), "a block is on the free list twice"
        assert not set(self._free) & census.keys(), "an owned block is on the free list"
        assert self._num_published.keys() <= self._tables.keys(), "blocks of a request that is gone count as published"
        tables = ((table, self._num_published.get(name, 0)) for name, table in self._tables.items())
        self._index.check(self._ref_counts, tables)
