"""Who goes first when cached blocks must make room: one small class a policy, chosen by `cache.eviction`.

A policy only ranks. What may go at all (nobody uses it, nothing cached stands behind it) is the index's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol


class Cached(Protocol):
    """What a policy may know of a cached prefix. All of it stands still while nobody uses the prefix."""

    published_at: int
    """Its place in the order of publication."""
    released_at: int
    """Its place in the order in which prefixes were last let go."""
    num_uses: int
    """Requests that have computed or reused it."""


class EvictionPolicy(ABC):
    """Ranks what may be evicted."""

    @abstractmethod
    def rank(self, cached: Cached) -> tuple[int, ...]:
        """The lowest goes first. Must not change while nobody uses `cached`; every rank has the same length."""


class LeastRecentlyUsed(EvictionPolicy):
    """What nobody has wanted for longest goes first."""

    def rank(self, cached: Cached) -> tuple[int, ...]:
        return (cached.released_at,)


class LeastFrequentlyUsed(EvictionPolicy):
    """What the fewest requests have used goes first; among those, what nobody has wanted for longest."""

    def rank(self, cached: Cached) -> tuple[int, ...]:
        return cached.num_uses, cached.released_at


class FirstInFirstOut(EvictionPolicy):
    """What was published first goes first, however much it is used."""

    def rank(self, cached: Cached) -> tuple[int, ...]:
        return (cached.published_at,)


POLICIES: dict[str, type[EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "fifo": FirstInFirstOut,
}
