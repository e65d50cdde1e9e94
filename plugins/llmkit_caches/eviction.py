"""Who goes first when cached blocks must make room: one small class a policy, chosen by `cache.eviction`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from llmkit import Evictable, EvictionPolicy, Settings


class LeastRecentlyUsed(EvictionPolicy):
    """What nobody has wanted for longest goes first."""

    def rank(self, cached: Evictable) -> tuple[int, ...]:
        return (cached.released_at,)


class LeastFrequentlyUsed(EvictionPolicy):
    """What the fewest requests have used goes first; among those, what nobody has wanted for longest."""

    def rank(self, cached: Evictable) -> tuple[int, ...]:
        return cached.num_uses, cached.released_at


class FirstInFirstOut(EvictionPolicy):
    """What was published first goes first, however much it is used."""

    def rank(self, cached: Evictable) -> tuple[int, ...]:
        return (cached.published_at,)


POLICIES: dict[str, type[EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "fifo": FirstInFirstOut,
}


class EvictionSettings(Settings):
    """The option of caches that evict."""

    parts: ClassVar[Mapping[str, Mapping[str, Callable[[], Any]]]] = {"eviction": POLICIES}
    eviction: Literal["lru", "lfu", "fifo"] = Field("lru", description="which unused cached block makes room first")

    def policy(self) -> EvictionPolicy:
        """The chosen one."""
        policy: EvictionPolicy = self.parts["eviction"][self.eviction]()
        return policy
