"""The contract of a KV-cache allocator: who owns which block. Torch-free, host integers only.

The device's memory belongs to the attention backend; an allocator only hands out block numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from llmkit.interfaces.settings import Settings as AnySettings
from llmkit.types import BlockCopy, Request


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Size of the pool an allocator divides: `num_blocks` blocks of `block_size` tokens.

    `window` is how many keys a query sees at most in any layer, its own included; None if a layer sees all.
    """

    num_blocks: int
    block_size: int
    window: int | None = None

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    def num_hidden_blocks(self, start: int) -> int:
        """Leading blocks that no query from position `start` on sees; the block before `start` is not among them."""
        if self.window is None:
            return 0
        num_kept = self.window - 1 if self.window > self.block_size else self.block_size
        return (start - num_kept) // self.block_size if start > num_kept else 0


class CacheStats(NamedTuple):
    """Blocks now: owned by a request, kept for reuse only, and free."""

    num_used_blocks: int
    num_cached_blocks: int
    num_free_blocks: int

    @property
    def num_unowned_blocks(self) -> int:
        """Blocks that requests can have: free ones, and cached ones, which make room."""
        return self.num_cached_blocks + self.num_free_blocks


class CacheAllocator(ABC):
    """Hands out KV blocks. Only the core calls it, never a scheduler.

    A request's block table maps token position p to block `block_table(request)[p // block_size]`.

    With `spec.window` an allocator may release blocks of a running request from the front: when a request starts behind
    reused tokens, and when `commit` says that all queries to come stand at `num_computed_tokens` or beyond. Never more
    than `spec.num_hidden_blocks` of that position. Steps in flight see no released block either, so it may be handed
    out at once. Its entry in the table stays, as any number, and nobody uses it.
    """

    Settings: ClassVar[type[AnySettings]] = AnySettings
    is_groupable: ClassVar[bool] = False
    """Whether layers of unlike windows may get an allocator of this class each: a pool and a block table per window.

    Worth it where blocks behind `spec.window` are released. Where prefixes are reused it takes `match_within` and
    `allocate_within`, since a prefix is what all of them find.
    """

    def __init__(self, settings: AnySettings, spec: CacheSpec) -> None:
        self.settings = settings
        self.spec = spec

    @property
    def reuses_prefixes(self) -> bool:
        """Whether `match` may answer with more than 0. Requests with one prompt are then run one before the others."""
        return False

    def match(self, request: Request) -> int:
        """Leading tokens of `request` whose KV is already in the cache. Pure; the default knows no reuse.

        The next `allocate` for the request must take those very blocks. Always less than `request.num_tokens`, never
        more than was committed of the same tokens for the same tenant, and 0 for a request that wants log-probabilities
        of its prompt, because all of that must run.
        """
        return 0

    def match_within(self, request: Request, most: int) -> int:
        """`match` if nothing behind the first `most` tokens were cached. Pure."""
        return 0

    @property
    def max_num_tokens(self) -> int | None:
        """Length of the longest request that can run, if it runs alone; None where only a window of it is held."""
        return self.spec.num_slots

    def num_released_blocks(self, request: Request) -> int:
        """Leading entries of `block_table(request)` whose blocks it has given back. Default: it keeps all."""
        return 0

    def num_missing_blocks(self, request: Request, upto: int) -> int:
        """Blocks, of those that nobody owns, that `allocate(request, upto)` would take at least. Pure."""
        return max(0, -(-upto // self.spec.block_size) - len(self.block_table(request)))

    @abstractmethod
    def allocate(self, request: Request, upto: int) -> bool:
        """Make `block_table(request)` cover positions below `upto`. All or nothing: False changes nothing."""

    def allocate_within(self, request: Request, upto: int, most: int) -> bool:
        """`allocate` for a request that holds nothing, which reuses its first `match_within(request, most)` tokens."""
        return self.allocate(request, upto)

    @property
    def forks(self) -> bool:
        """Whether `fork` works. Without it samples of a prompt share what `match` finds."""
        return False

    def fork(self, request: Request, parent: Request, num_tokens: int, upto: int) -> tuple[BlockCopy, ...] | None:
        """Start `request`, which holds nothing, on the first `num_tokens` of `parent`; cover positions below `upto`.

        They have these tokens and their tenant in common; all of them were committed for `parent`, which holds every
        block that a query at `num_tokens` sees. Full blocks are shared and belong to both from now on. `request` is
        about to write into the one that is partly filled, so it gets one of its own instead, and the answer says what
        must be copied there before the step runs. All or nothing: None changes nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} does not fork")

    def commit(self, request: Request, num_computed_tokens: int) -> None:
        """KV below `num_computed_tokens` is now valid and may be published for reuse. Default: nothing to do.

        It is final: nobody writes there again, whatever is truncated later. No query to come stands below it.
        """
        return None

    @abstractmethod
    def truncate(self, request: Request, upto: int) -> None:
        """Give back the blocks that only hold positions at or beyond `upto`, where the layout allows it."""

    @abstractmethod
    def free(self, request: Request) -> None:
        """Give back everything `request` holds; a request that holds nothing is left alone."""

    @abstractmethod
    def block_table(self, request: Request) -> Sequence[int]:
        """Block numbers of `request` in position order; empty if it holds none, never released ones only."""

    @abstractmethod
    def stats(self) -> CacheStats:
        """Count of used, cached and free blocks; they add up to `spec.num_blocks`."""

    @abstractmethod
    def census(self) -> dict[int, tuple[str, ...]]:
        """Owned block -> ids of the requests that own it."""

    def check(self) -> None:
        """Raise AssertionError on a broken invariant. Extend it with the allocator's own."""
        stats, census = self.stats(), self.census()
        total = stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks
        assert total == self.spec.num_blocks, f"{stats} does not add up to {self.spec.num_blocks} blocks"
        assert len(census) == stats.num_used_blocks, f"{len(census)} owned blocks, {stats.num_used_blocks} used"
        is_inside = not census or (min(census) >= 0 and max(census) < self.spec.num_blocks)
        assert is_inside, "block number out of range"
