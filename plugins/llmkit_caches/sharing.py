"""What caches that reuse prefixes share: block tables over a pool whose blocks may have several owners.

Blocks are free, used (counted by reference) or cached: published, used by nobody, kept until their room is needed.
With a window a running request gives back its first blocks, which stay in its table as RELEASED.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit import BlockCopy, CacheAllocator, CacheSpec, CacheStats, Request, Settings
from llmkit_caches.index import CachedBlock, PrefixIndex

RELEASED = -1


class SharingCache(CacheAllocator):
    """Any free block serves any request, and full blocks that were computed once serve whoever needs them."""

    is_groupable = True

    def __init__(self, settings: Settings, spec: CacheSpec, index: PrefixIndex[Any], is_on: bool = True) -> None:
        super().__init__(settings, spec)
        self._free = list(range(spec.num_blocks - 1, -1, -1))
        self._ref_counts = [0] * spec.num_blocks
        self._tables: dict[str, list[int]] = {}
        self._is_on = is_on
        self._index = index
        self._num_published: dict[str, int] = {}
        self._num_released: dict[str, int] = {}

    @property
    def reuses_prefixes(self) -> bool:
        return self._is_on

    @property
    def max_num_tokens(self) -> int | None:
        """None if the window and one more block fit: then all that is behind the window can be released in time."""
        window, spec = self.spec.window, self.spec
        return spec.num_slots if window is None or spec.num_slots < window + spec.block_size else None

    def num_released_blocks(self, request: Request) -> int:
        return self._num_released.get(request.request_id, 0)

    def match(self, request: Request) -> int:
        return len(self._index.find(request)) * self.spec.block_size if self._is_on else 0

    def match_within(self, request: Request, most: int) -> int:
        return len(self._reusable(request, most // self.spec.block_size)) * self.spec.block_size

    def num_missing_blocks(self, request: Request, upto: int) -> int:
        num_blocks = -(-upto // self.spec.block_size)
        table = self._tables.get(request.request_id)
        if table is None:
            return self._num_taken(self._reusable(request, num_blocks), num_blocks)
        return max(0, num_blocks - len(table))

    def allocate(self, request: Request, upto: int) -> bool:
        num_blocks = -(-upto // self.spec.block_size)
        table = self._tables.get(request.request_id)
        if table is None:
            table = self._start(request, num_blocks, num_blocks)
        return table is not None and self._grow(table, num_blocks)

    def allocate_within(self, request: Request, upto: int, most: int) -> bool:
        num_blocks = -(-upto // self.spec.block_size)
        table = self._start(request, num_blocks, min(num_blocks, most // self.spec.block_size))
        return table is not None and self._grow(table, num_blocks)

    def _start(self, request: Request, num_blocks: int, most: int) -> list[int] | None:
        """A table with what `request` reuses of its first `most` blocks; None if there is no room for `num_blocks`."""
        reusable = self._reusable(request, most)
        if self._num_taken(reusable, num_blocks) > len(self._free) + self._index.num_idle:
            return None
        table: list[int] = []
        num_released = self._num_hidden(reusable)
        for cached in reusable[num_released:]:
            self._index.use(cached)
            self._ref_counts[cached.blocks[0]] += 1
            table.append(cached.blocks[0])
        if num_released:
            table[:0] = [RELEASED] * num_released
            self._num_released[request.request_id] = num_released
        if num_blocks:
            self._tables[request.request_id] = table
            self._num_published[request.request_id] = len(table)
            self._index.forget(request)
        return table

    def _grow(self, table: list[int], num_blocks: int) -> bool:
        """Append new blocks up to `num_blocks`; all or none."""
        num_new = num_blocks - len(table)
        if num_new > len(self._free) and num_new > len(self._free) + self._index.num_idle:
            return False
        for _ in range(num_new):
            block = self._free.pop() if self._free else self._index.evict()
            self._ref_counts[block] = 1
            table.append(block)
        return True

    @property
    def forks(self) -> bool:
        return True

    def fork(self, request: Request, parent: Request, num_tokens: int, upto: int) -> tuple[BlockCopy, ...] | None:
        num_shared, num_left = divmod(num_tokens, self.spec.block_size)
        num_blocks = -(-upto // self.spec.block_size)
        if num_blocks - num_shared > len(self._free) + self._index.num_idle:
            return None
        self._publish(parent, num_tokens)  # or both would, where a commit has failed
        theirs, num_released = self._tables[parent.request_id], self.spec.num_hidden_blocks(num_tokens)
        table = [RELEASED] * num_released + theirs[num_released:num_shared]
        for block in theirs[num_released:num_shared]:
            self._index.share(block)
            self._ref_counts[block] += 1
        if num_released:
            self._num_released[request.request_id] = num_released
        self._tables[request.request_id] = table
        self._num_published[request.request_id] = num_shared if self._is_on else 0
        self._index.forget(request)
        self._grow(table, num_blocks)
        return (BlockCopy(theirs[num_shared], table[num_shared], num_left),) if num_left else ()

    def _reusable(self, request: Request, num_blocks: int) -> Sequence[CachedBlock]:
        """What `request` reuses of its first `num_blocks` blocks when it starts."""
        return self._index.find(request, num_blocks) if self._is_on else ()

    def _num_hidden(self, reusable: Sequence[CachedBlock]) -> int:
        """How many of them a request that starts behind them does not see."""
        return self.spec.num_hidden_blocks(len(reusable) * self.spec.block_size)

    def _num_taken(self, reusable: Sequence[CachedBlock], num_blocks: int) -> int:
        """How many of `num_blocks` belong to nobody yet: the new ones, and reused ones that are only cached."""
        if not reusable:
            return num_blocks
        seen = reusable[self._num_hidden(reusable) :]
        return num_blocks - len(reusable) + sum([cached.is_idle for cached in seen])

    def commit(self, request: Request, num_computed_tokens: int) -> None:
        self._publish(request, num_computed_tokens)
        if self.spec.window is None:
            return
        num_hidden = self.spec.num_hidden_blocks(num_computed_tokens)
        num_released = self._num_released.get(request.request_id, 0)
        if num_hidden > num_released:
            table = self._tables[request.request_id]
            for index in range(num_released, num_hidden):
                self._let_go(table[index])
                table[index] = RELEASED
            self._num_released[request.request_id] = num_hidden

    def _publish(self, request: Request, num_computed_tokens: int) -> None:
        num_full = num_computed_tokens // self.spec.block_size
        num_published = self._num_published.get(request.request_id, 0)
        if num_full <= num_published or not self._is_on:
            return
        table = self._tables[request.request_id]
        self._free += self._index.publish(request, table, num_published, num_full)
        self._num_published[request.request_id] = num_full

    def truncate(self, request: Request, upto: int) -> None:
        """With a window a request that would keep released blocks only gives them back as well."""
        table = self._tables.get(request.request_id, [])
        self._release(table, -(-upto // self.spec.block_size))
        if len(table) < self._num_published.get(request.request_id, 0):
            self._num_published[request.request_id] = len(table)
        if len(table) <= self._num_released.get(request.request_id, 0):
            self.free(request)

    def free(self, request: Request) -> None:
        self._release(self._tables.pop(request.request_id, []), 0)
        self._num_published.pop(request.request_id, None)
        self._num_released.pop(request.request_id, None)

    def _release(self, table: list[int], keep: int) -> None:
        """Give back all but the first `keep` blocks, the last first: what stands behind an unused one is unused."""
        while len(table) > keep:
            block = table.pop()
            if block != RELEASED:
                self._let_go(block)

    def _let_go(self, block: int) -> None:
        """One user less; the last one leaves the block free, or cached."""
        self._ref_counts[block] -= 1
        if not self._ref_counts[block] and not self._index.release(block):
            self._free.append(block)

    def block_table(self, request: Request) -> Sequence[int]:
        return self._tables.get(request.request_id, ())

    def stats(self) -> CacheStats:
        num_free, num_cached = len(self._free), self._index.num_idle
        return CacheStats(self.spec.num_blocks - num_free - num_cached, num_cached, num_free)

    def census(self) -> dict[int, tuple[str, ...]]:
        census: dict[int, tuple[str, ...]] = {}
        for request_id, table in self._tables.items():
            num_released = self._num_released.get(request_id, 0) if self._num_released else 0
            own = table[num_released:] if num_released else table
            held: dict[int, tuple[str, ...]] = dict.fromkeys(own, (request_id,))
            for block in held.keys() & census.keys():
                held[block] = (*census[block], request_id)
            census.update(held)
        return census

    def check(self) -> None:
        free, tables, published, released = self._free, self._tables, self._num_published, self._num_released
        counts = [0] * self.spec.num_blocks
        for name, table in tables.items():
            num_released = released.get(name, 0)
            assert table[:num_released] == [RELEASED] * num_released, f"{name}: {num_released} released of {table}"
            assert len(table) > num_released, f"{name} keeps none of {table}"
            held = table[num_released:] if num_released else table
            assert min(held) >= 0, f"{name}: {num_released} released of {table}"
            for block in held:
                counts[block] += 1
        assert self._ref_counts == counts, f"blocks are counted {self._ref_counts} times, owned {counts} times"
        stats, num_used = self.stats(), len(counts) - counts.count(0)
        assert stats.num_used_blocks == num_used, f"{num_used} owned blocks, {stats}"
        assert len(set(free)) == len(free), "a block is on the free list twice"
        assert not any(map(counts.__getitem__, free)), "an owned block is on the free list"
        assert published.keys() <= tables.keys(), "blocks of a request that is gone count as published"
        assert released.keys() <= tables.keys(), "blocks of a request that is gone count as released"
        self._index.check(
            self._ref_counts, [(table, published.get(name, 0), released.get(name, 0)) for name, table in tables.items()]
        )
