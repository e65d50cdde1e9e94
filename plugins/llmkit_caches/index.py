"""Which full blocks can be found again: what every index of cached prefixes shares.

A cached block stands for all tokens up to its end, of one tenant. Whoever uses it uses everything before it, so what
stands behind an unused one is unused as well: unused ones can always go, the outermost first, and nothing cached ever
stands behind something evicted. A subclass says how blocks hang together and how the next one is found.

With a window whoever uses a block uses those that the window reaches, so any unused one can go. One with others behind
it leaves an empty place, and a prefix is found if the last blocks of it, as far as the window reaches, are there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from llmkit import CacheSpec, EvictionPolicy, Request


@dataclass(slots=True, eq=False)
class CachedBlock:
    """One block of tokens behind others, and the blocks of the pool that hold its KV.

    There are several while requests use copies that they computed side by side, none once it is evicted. It is idle
    while nobody uses it. `ticket` is its place in the queue for eviction, 0 if it has none. It is gone when nothing
    stands behind it either: until then an evicted one keeps its place. The rest is `Evictable`.
    """

    blocks: list[int] = field(default_factory=list, kw_only=True)
    published_at: int = field(default=0, kw_only=True)
    released_at: int = field(default=0, kw_only=True)
    num_uses: int = field(default=0, kw_only=True)
    is_idle: bool = field(default=False, kw_only=True)
    ticket: int = field(default=0, kw_only=True)
    is_gone: bool = field(default=False, kw_only=True)


C = TypeVar("C", bound=CachedBlock)
MAX_REMEMBERED = 256


class PrefixIndex(ABC, Generic[C]):
    """Published blocks of every tenant. It is told which are used and which are not; it counts no references."""

    def __init__(self, spec: CacheSpec, policy: EvictionPolicy) -> None:
        self.num_idle = 0
        self._spec = spec
        self._block_size = spec.block_size
        self._policy = policy
        self._of_block: dict[int, C] = {}
        self._queue: list[tuple[tuple[int, ...], int, C]] = []
        self._time = 0
        self._found: dict[Request, list[C]] = {}

    # How blocks hang together ------------------------------------------------------------------------------------

    @abstractmethod
    def _extend(self, request: Request, found: list[C], limit: int) -> None:
        """Append what is cached of `request` behind `found`, up to `limit` blocks in all."""

    @abstractmethod
    def _get_or_add(self, request: Request, parent: C | None, token_ids: tuple[int, ...]) -> C:
        """The cached block of these tokens behind `parent`, a new one if there is none.

        Behind nothing, it is one of the request's tenant.
        """

    @abstractmethod
    def _remove(self, cached: C) -> C | None:
        """Take out a block behind which there is none; the one before it, if there is one."""

    @abstractmethod
    def _is_last(self, cached: C) -> bool:
        """Whether nothing cached stands behind it."""

    @abstractmethod
    def _parents(self) -> dict[C, C | None]:
        """Every cached block and the one before it, for `check`; AssertionError where the shape itself is wrong."""

    # What is the same for all ------------------------------------------------------------------------------------

    def find(self, request: Request, most: int | None = None) -> Sequence[C]:
        """The first cached blocks of `request`, `most` at most, in order, that leave its last token to be computed.

        With a window those that it does not reach from their end may have been evicted.
        None of a request that wants log-probabilities of its prompt, because all of that must run. Asking again for
        one of the last `MAX_REMEMBERED` requests costs only what has changed since.
        """
        if request.sampling_params.prompt_logprobs is not None:
            return ()
        found = self._found.get(request)
        if found is None:
            if len(self._found) >= MAX_REMEMBERED:
                del self._found[next(iter(self._found))]
            found = self._found[request] = []
        while found and found[-1].is_gone:
            found.pop()
        self._extend(request, found, (request.num_tokens - 1) // self._block_size)
        if self._spec.window is None:
            return found if most is None else found[:most]
        return found[: self._num_usable(found, len(found) if most is None else min(most, len(found)))]

    def _num_usable(self, found: Sequence[C], end: int) -> int:
        """How many, `end` at most, so that the last of them, as far as the window reaches, have their blocks."""
        at, first = end, self._spec.num_hidden_blocks(end * self._block_size)
        while at > first:
            at -= 1
            if not found[at].blocks:
                end, first = at, self._spec.num_hidden_blocks(at * self._block_size)
        return end

    def forget(self, request: Request) -> None:
        """Drop what `find` remembers of a request: its answer has been used."""
        self._found.pop(request, None)

    def publish(self, request: Request, table: Sequence[int], first: int, end: int) -> list[int]:
        """Make blocks `first` to `end` of a request findable, whose KV is valid. Returns blocks this made redundant."""
        redundant: list[int] = []
        size = self._block_size
        cached = self._of_block[table[first - 1]] if first else None
        for index in range(first, end):
            token_ids = tuple(request.token_ids[index * size : (index + 1) * size])
            cached = self._get_or_add(request, cached, token_ids)
            if cached.is_idle:
                redundant += cached.blocks
                for block in cached.blocks:
                    del self._of_block[block]
                cached.blocks.clear()
            self.use(cached)
            cached.blocks.append(table[index])
            self._of_block[table[index]] = cached
        return redundant

    def use(self, cached: C) -> None:
        """One more request uses `cached`; it cannot be evicted until all its blocks are released."""
        cached.num_uses += 1
        if cached.is_idle:
            cached.is_idle, cached.ticket = False, 0
            self.num_idle -= 1

    def share(self, block: int) -> None:
        """One more request uses `block`, which others use."""
        cached = self._of_block.get(block)
        if cached is not None:
            self.use(cached)

    def release(self, block: int) -> bool:
        """Nobody uses `block` any more. Whether it is kept: a published one is, unless there is another copy."""
        cached = self._of_block.get(block)
        if cached is None:
            return False
        if len(cached.blocks) > 1:
            cached.blocks.remove(block)
            del self._of_block[block]
            return False
        cached.is_idle, cached.released_at = True, self._tick()
        self.num_idle += 1
        if self._spec.window is not None or self._is_last(cached):
            self._queue_up(cached)
        return True

    def evict(self) -> int:
        """Forget the unused block that the policy ranks lowest among those that can go. There must be one."""
        while True:
            _, ticket, cached = heappop(self._queue)
            if cached.ticket == ticket:
                break
        block = cached.blocks.pop()
        del self._of_block[block]
        cached.is_idle, cached.ticket = False, 0
        self.num_idle -= 1
        last: C | None = cached
        while last is not None and not last.blocks and self._is_last(last):
            last.is_gone = True
            last = self._remove(last)
        if last is not None and last.is_idle and self._is_last(last):
            self._queue_up(last)
        return block

    def check(self, ref_counts: Sequence[int], tables: Iterable[tuple[Sequence[int], int, int]]) -> None:
        """Raise AssertionError where the books are wrong.

        `ref_counts` says how many tables hold each block; each of `tables` comes with how many of it are published and
        how many released.
        """
        parents, of_block = self._parents(), self._of_block
        self._check_use(parents, ref_counts)
        for table, num_published, num_released in tables:
            chain = [*map(of_block.get, table[num_released:] if num_released else table)]
            num_found = max(0, num_published - num_released)
            num_missing = len(chain) - num_found
            assert None not in chain[:num_found], f"{table}: not all of {num_found} blocks can be found"
            assert chain.count(None) == num_missing, f"{table}: blocks beyond {num_found} can be found"
            if num_found:
                before = [parents[cached] for cached in chain[:num_found] if cached is not None]
                assert (before[0] is not None) == (num_released > 0), f"{table}: what was released is gone"
                assert before[1:] == chain[: num_found - 1], f"{table}: cached blocks are not in a row"

    def _check_use(self, parents: dict[C, C | None], ref_counts: Sequence[int]) -> None:
        of_block = {block: cached for cached in parents for block in cached.blocks}
        assert of_block == self._of_block, "a block of the pool stands for a cached one that does not know it"
        num_blocks = sum([len(cached.blocks) for cached in parents])
        assert len(of_block) == num_blocks, "a block of the pool stands for two cached ones"
        has_window, last = self._spec.window is not None, parents.keys() - parents.values()
        assert last == {*filter(self._is_last, parents)}, "what stands last is not known"
        idle = {cached for cached in parents if cached.is_idle}
        queued = {cached for _, ticket, cached in self._queue if cached.ticket == ticket}
        assert queued == (idle if has_window else idle & last), "what can be evicted is not what waits for it"
        assert self.num_idle == len(idle), "unused blocks are miscounted"
        held = {*of_block.values()}
        is_kept = len(held) == len(parents) or (has_window and held >= last)
        assert is_kept and True not in [cached.is_gone for cached in parents], "an evicted block can still be found"
        unused = {cached for block, cached in of_block.items() if not ref_counts[block]}
        assert unused == idle, f"of {of_block} unused are blocks of {unused}, idle are {idle}"
        copies = [cached.blocks for cached in idle if len(cached.blocks) > 1]
        assert not copies, f"there are copies of unused blocks: {copies}"
        if not has_window and idle:
            behind = [cached.blocks for cached, before in parents.items() if before in idle and cached not in idle]
            assert not behind, f"used blocks stand behind unused ones: {behind}"

    def _queue_up(self, cached: C) -> None:
        """It can go from now on. Entries of those that have been used since are swept out before they pile up."""
        cached.ticket = self._tick()
        heappush(self._queue, (self._policy.rank(cached), cached.ticket, cached))
        if len(self._queue) > 2 * self.num_idle + 64:
            self._queue = [entry for entry in self._queue if entry[2].ticket == entry[1]]
            heapify(self._queue)

    def _tick(self) -> int:
        self._time += 1
        return self._time
