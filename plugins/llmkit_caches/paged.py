"""Paged KV cache: any free block serves any request; blocks are counted by reference and reused at once."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit import CacheAllocator, CacheSpec, CacheStats, Request, Settings


class PagedCache(CacheAllocator):
    """Block tables over a free list (Kwon et al. 2023, "PagedAttention")."""

    def __init__(self, settings: Settings, spec: CacheSpec) -> None:
        super().__init__(settings, spec)
        self._free = list(range(spec.num_blocks - 1, -1, -1))
        self._ref_counts = [0] * spec.num_blocks
        self._tables: dict[str, list[int]] = {}

    def allocate(self, request: Request, upto: int) -> bool:
        table = self._tables.get(request.request_id, [])
        num_new = -(-upto // self.spec.block_size) - len(table)
        if num_new <= 0:
            return True
        if num_new > len(self._free):
            return False
        self._tables.setdefault(request.request_id, table)
        for _ in range(num_new):
            block = self._free.pop()
            self._ref_counts[block] = 1
            table.append(block)
        return True

    def truncate(self, request: Request, upto: int) -> None:
        table = self._tables.get(request.request_id, [])
        self._release(table, -(-upto // self.spec.block_size))
        if not table:
            self._tables.pop(request.request_id, None)

    def free(self, request: Request) -> None:
        self._release(self._tables.pop(request.request_id, []), 0)

    def _release(self, table: list[int], keep: int) -> None:
        while len(table) > keep:
            block = table.pop()
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                self._free.append(block)

    def block_table(self, request: Request) -> Sequence[int]:
        return self._tables.get(request.request_id, ())

    def stats(self) -> CacheStats:
        num_free = len(self._free)
        return CacheStats(self.spec.num_blocks - num_free, 0, num_free)

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
