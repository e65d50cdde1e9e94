"""The contract of an eviction policy: which cached block makes room first. Torch-free, host integers only.

What may go at all (nobody uses it, nothing cached stands behind it) is the cache's business, so a policy can be
wasteful but never wrong. Caches with an option `eviction` make the chosen one and ask it for every candidate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol


class Evictable(Protocol):
    """What a policy may know of a cached block. All of it stands still while nobody uses the block."""

    published_at: int
    """Its place in the order of publication."""
    released_at: int
    """Its place in the order in which blocks were last let go."""
    num_uses: int
    """Requests that have computed or reused it."""


class EvictionPolicy(ABC):
    """Ranks what may be evicted."""

    @abstractmethod
    def rank(self, cached: Evictable) -> tuple[int, ...]:
        """The lowest goes first. Must not change while nobody uses `cached`; every rank has the same length."""
