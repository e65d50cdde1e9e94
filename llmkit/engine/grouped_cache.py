"""Layers of unlike windows: an allocator for each group of them, behind one that the planner speaks to. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmkit.interfaces.cache import CacheAllocator, CacheStats
from llmkit.types import BlockCopy, Request

Forked = tuple[tuple[BlockCopy, ...], ...]
"""What is copied in each group, in order, for a request that was forked."""


class GroupedCache(CacheAllocator):
    """`groups` of one class and block size, those who see furthest first; each has a pool and tables of its own.

    What is asked of it, counts and the block table, is the first group's; tables of all have the same length. Every
    request holds its tokens in all of them or in none, and a cached prefix is one that all of them find. Requests are
    forked by `fork_all`, since each group has copies of its own.
    """

    is_groupable = False

    def __init__(self, groups: Sequence[CacheAllocator]) -> None:
        self._first = groups[0]
        super().__init__(self._first.settings, self._first.spec)
        self.groups = tuple(groups)

    @property
    def reuses_prefixes(self) -> bool:
        return self._first.reuses_prefixes

    @property
    def max_num_tokens(self) -> int | None:
        limits = [limit for group in self.groups if (limit := group.max_num_tokens) is not None]
        return min(limits, default=None)

    def match(self, request: Request) -> int:
        """What one group finds may end where another has a gap in its window, so they are asked until all agree."""
        num_cached, agreed = self._first.match(request), -1
        while num_cached != agreed:
            agreed = num_cached
            for group in self.groups:
                num_cached = group.match_within(request, num_cached)
        return num_cached

    def num_released_blocks(self, request: Request) -> int:
        return self._first.num_released_blocks(request)

    def num_missing_blocks(self, request: Request, upto: int) -> int:
        return self._first.num_missing_blocks(request, upto)

    def allocate(self, request: Request, upto: int) -> bool:
        """Those that would refuse are asked first, so that the others evict nothing in vain."""
        if any(group.num_missing_blocks(request, upto) > group.stats().num_unowned_blocks for group in self.groups):
            return False
        reach = len(self.block_table(request)) * self.spec.block_size
        if reach:
            return self._all(lambda group: group.allocate(request, upto), lambda group: group.truncate(request, reach))
        most = self.match(request)
        return self._all(lambda group: group.allocate_within(request, upto, most), lambda group: group.free(request))

    def fork_all(self, request: Request, parent: Request, num_tokens: int, upto: int) -> Forked | None:
        """`CacheAllocator.fork` in all groups or in none; whose room does not suffice is asked first, as above."""
        num_own = -(-upto // self.spec.block_size) - num_tokens // self.spec.block_size
        if any(num_own > group.stats().num_unowned_blocks for group in self.groups):
            return None
        copies: list[tuple[BlockCopy, ...]] = []

        def take(group: CacheAllocator) -> bool:
            found = group.fork(request, parent, num_tokens, upto)
            copies.append(found or ())
            return found is not None

        return tuple(copies) if self._all(take, lambda group: group.free(request)) else None

    def _all(self, take: Callable[[CacheAllocator], bool], undo: Callable[[CacheAllocator], None]) -> bool:
        """Whether all groups take; undone for those that did where one does not, or fails."""
        done: list[CacheAllocator] = []
        try:
            for group in self.groups:
                if not take(group):
                    break
                done.append(group)
        finally:
            if len(done) < len(self.groups):
                for group in done:
                    undo(group)
        return len(done) == len(self.groups)

    def commit(self, request: Request, num_computed_tokens: int) -> None:
        for group in self.groups:
            group.commit(request, num_computed_tokens)

    def truncate(self, request: Request, upto: int) -> None:
        """Where a group has released blocks, all keep the one behind those, so that none of them holds nothing."""
        num_released = max(group.num_released_blocks(request) for group in self.groups)
        if num_released:
            upto = max(upto, (num_released + 1) * self.spec.block_size)
        for group in self.groups:
            group.truncate(request, upto)

    def free(self, request: Request) -> None:
        """The first group last: while it holds something, a failure of another can be made good."""
        for group in reversed(self.groups):
            group.free(request)

    def block_table(self, request: Request) -> Sequence[int]:
        return self._first.block_table(request)

    def stats(self) -> CacheStats:
        return self._first.stats()

    def census(self) -> dict[int, tuple[str, ...]]:
        return self._first.census()

    def check(self) -> None:
        for group in self.groups:
            group.check()


def groups_of(cache: CacheAllocator) -> tuple[CacheAllocator, ...]:
    """The allocators of a cache, one for each group of layers; mostly it is the only one."""
    return cache.groups if isinstance(cache, GroupedCache) else (cache,)


def fork_in_groups(
    cache: CacheAllocator, request: Request, parent: Request, num_tokens: int, upto: int
) -> Forked | None:
    """`CacheAllocator.fork` for a cache of one group or several."""
    if isinstance(cache, GroupedCache):
        return cache.fork_all(request, parent, num_tokens, upto)
    copies = cache.fork(request, parent, num_tokens, upto)
    return None if copies is None else (copies,)
