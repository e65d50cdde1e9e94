"""Which requests are on the device: their slots and blocks, and those still pinned by a step in flight. Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import NamedTuple

from llmkit.engine.containment import Containment
from llmkit.engine.forks import Forks
from llmkit.engine.grouped_cache import Forked, fork_in_groups, groups_of
from llmkit.engine.swapping import HostPool
from llmkit.interfaces.cache import CacheAllocator
from llmkit.types import BlockTableEdit, Edits, Request

UNLIMITED = 1 << 30


class Found(NamedTuple):
    """What a waiting request need not compute: KV of its first `num_ready` tokens, `num_pooled` of them in the pool.

    With `parent` it is forked from that request.
    """

    num_pooled: int
    num_ready: int
    parent: Request | None


class Residency:
    """Lends out slots and blocks, and takes them back only after the last step in flight that names them.

    `num_held_blocks` and `num_scheduled_tokens` (computed or in flight) are those of all requests on the device;
    blocks that a request has released are full and count on both sides. Mostly there is one group of layers; counts of
    blocks are those of the first of the `groups`.
    """

    def __init__(
        self, allocator: CacheAllocator, max_num_seqs: int, host: HostPool | None = None, forks: bool = True
    ) -> None:
        self.allocator = allocator
        self.groups = groups_of(allocator)
        self.forks = Forks(self.groups, forks)
        self.has_groups = len(self.groups) > 1
        self._unbound = [group for group in self.groups if group.max_num_tokens is None]
        self.host = host
        self.block_size = allocator.spec.block_size
        self._has_window = allocator.spec.window is not None
        self.num_landed_steps = 0
        self.num_reclaiming_blocks = 0
        self.num_held_blocks = 0
        self.num_scheduled_tokens = 0
        self.containment = Containment()
        self._num_stays = 0
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._pinned: deque[tuple[int, Request, int]] = deque()

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_unowned_blocks(self) -> int:
        return self.allocator.stats().num_unowned_blocks

    def find(self, request: Request) -> Found:
        """What a waiting request need not compute; forking it is worth the copy where it spares the most."""
        num_cached, fork = self.allocator.match(request), self.forks.find(request)
        num_ready = max(num_cached, self.num_saved_tokens(request))
        if fork is not None and fork.num_tokens > num_ready:
            return Found(fork.num_tokens, fork.num_tokens, fork.parent)
        return Found(num_cached, num_ready, None)

    def num_found_tokens(self, request: Request) -> int:
        """Leading tokens of a waiting request whose KV is in the pool."""
        return self.find(request).num_pooled

    def start(self, request: Request, found: Found, upto: int) -> Forked | None:
        """Cover positions below `upto` with blocks, behind what was found. What the step must copy; None: no room."""
        if found.parent is None:
            return () if self.reserve(request, upto) else None
        copies = fork_in_groups(self.allocator, request, found.parent, found.num_pooled, upto)
        if copies is not None:
            self._count_blocks(request)
        return copies

    def reserve(self, request: Request, upto: int) -> bool:
        """Cover positions below `upto` with blocks; all or nothing."""
        if not self.allocator.allocate(request, upto):
            return False
        self._count_blocks(request)
        return True

    def _count_blocks(self, request: Request) -> None:
        """Its table has changed. One that has just started gives it back if that fails."""
        try:
            num_blocks = len(self.allocator.block_table(request))
        except BaseException:
            if not request.num_blocks:
                self.allocator.free(request)
            raise
        self.num_held_blocks += num_blocks - request.num_blocks
        request.num_blocks = num_blocks
        if self._has_window:
            request.num_released_blocks = self.allocator.num_released_blocks(request)

    def num_fitting_tokens(self, request: Request, start: int, num_cached_tokens: int = 0) -> int:
        """Tokens from position `start` on that fit if `request` has the pool to itself, given what it has released.

        One that holds nothing is going to reuse `num_cached_tokens`.
        No bound where a request has to fit whole: one that does not never fits.
        """
        num_tokens = UNLIMITED
        for group in self._unbound:
            spec = group.spec
            num_hidden = max(group.num_released_blocks(request), spec.num_hidden_blocks(num_cached_tokens))
            num_tokens = min(num_tokens, (num_hidden + spec.num_blocks) * spec.block_size - start)
        return num_tokens

    def num_missing_blocks(self, request: Request, most_at_once: int) -> int:
        """Blocks still to be found before every known token has its place, a window and `most_at_once` at a time.

        Where a further group lacks some, as many more than are free as it lacks.
        """
        first, *others = [self._num_missing(group, request, most_at_once) for group in self.groups]
        if not others:
            return first
        frees = [group.stats().num_unowned_blocks for group in self.groups]
        return max(first, *(frees[0] + num - free for num, free in zip(others, frees[1:], strict=True)))

    def _num_missing(self, group: CacheAllocator, request: Request, most_at_once: int) -> int:
        num_missing = group.num_missing_blocks(request, request.num_tokens)
        fork = self.forks.find(request)
        if fork is not None and fork.num_tokens > self.num_saved_tokens(request):
            num_own = -(-request.num_tokens // self.block_size) - fork.num_tokens // self.block_size
            num_missing = min(num_missing, num_own)
        if group.spec.window is None or group.max_num_tokens is not None:
            return num_missing
        return min(num_missing, -(-(group.spec.window + most_at_once) // self.block_size) + 1)

    def edit(self, request: Request) -> BlockTableEdit:
        """The blocks of `request` that the device does not know yet; whoever sends it counts them as sent."""
        first = max(request.num_sent_blocks, request.num_released_blocks)
        return BlockTableEdit(request.slot, first, tuple(self.allocator.block_table(request)[first:]))

    def more_edits(self, requests: Collection[Request]) -> tuple[Edits, ...]:
        """The same of each group behind the first, for all `requests`; empty if there are none."""
        if not (requests and self.has_groups):
            return ()
        return tuple([tuple([_edit(group, one) for one in requests]) for group in self.groups[1:]])

    def publish(self, request: Request, num_computed_tokens: int) -> None:
        """KV below `num_computed_tokens` is valid. An allocator that fails to publish it harms nobody."""
        try:
            self.allocator.commit(request, num_computed_tokens)
            if self._has_window:
                request.num_released_blocks = self.allocator.num_released_blocks(request)
        except BaseException as fault:
            self.containment.take(fault, "publishing KV")

    def num_saved_tokens(self, request: Request) -> int:
        """Leading tokens of `request` whose KV is in host memory."""
        return 0 if self.host is None else self.host.num_tokens(request)

    def save(self, request: Request) -> None:
        """Keep in host memory what `request` has computed, if that pays. What fails here is computed again.

        What a window has left behind is gone, and no allocator gives out the rest alone: such a request starts anew.
        So do those of several groups.
        """
        if self.host is None or not request.num_computed_tokens or request.num_released_blocks or self.has_groups:
            return
        try:
            self.host.save(request, self.allocator.block_table(request))
        except BaseException as fault:
            self.containment.take(fault, "saving KV")

    def enter(self, request: Request, found: Found) -> None:
        """Give `request` a slot and an epoch of its own; the caller has checked that a slot is free.

        A fork takes nothing back from the host, not even a part of the block that is copied.
        """
        if self.host is not None:
            self.host.start(request, found.num_pooled if found.parent is None else request.num_blocks * self.block_size)
        request.slot = self._free_slots.pop()
        self._num_stays += 1
        request.epoch = self._num_stays

    def leave(self, request: Request) -> int:
        """Take `request` off the device: its results in flight go stale. Returns the blocks free at once."""
        num_blocks, slot = request.num_blocks - request.num_released_blocks, request.slot
        self.num_held_blocks -= request.num_blocks
        self.num_scheduled_tokens -= request.num_computed_tokens + request.num_in_flight_tokens
        request.epoch, request.slot = 0, -1
        request.num_blocks = request.num_sent_blocks = request.num_released_blocks = 0
        request.num_computed_tokens = request.num_in_flight_tokens = request.num_pending_samples = 0
        if request.last_step_id >= self.num_landed_steps:
            self._pinned.append((request.last_step_id, request, slot))
            self.num_reclaiming_blocks += num_blocks
            return 0
        num_before = self._count_unowned()
        try:
            self.allocator.free(request)
        except BaseException as fault:
            self.containment.take(fault, "freeing blocks")
            self._pinned.appendleft((-1, request, slot))
            self.num_reclaiming_blocks += num_blocks
            return 0
        self._free_slots.append(slot)
        return max(0, self._count_unowned() - num_before)

    def _count_unowned(self) -> int:
        """Blocks nobody owns; 0 if the allocator fails to say, which must not keep a request from leaving."""
        try:
            return self.num_unowned_blocks
        except BaseException as fault:
            self.containment.take(fault, "counting blocks")
            return 0

    def is_pinned(self, request: Request) -> bool:
        """Whether blocks of an earlier stay under this id still wait for a step in flight."""
        return any(pinned.request_id == request.request_id for _, pinned, _ in self._pinned)

    def land(self, step_id: int) -> None:
        """Step `step_id` has run: give back what only it and earlier steps named."""
        self.num_landed_steps = step_id + 1
        while self._pinned and self._pinned[0][0] <= step_id:
            _, request, slot = self._pinned[0]
            try:
                num_blocks = len(self.allocator.block_table(request)) - self.allocator.num_released_blocks(request)
                self.allocator.free(request)
            except BaseException as fault:  # it is tried again before the next step is planned
                self.containment.take(fault, "freeing blocks")
                return
            self._pinned.popleft()
            self.num_reclaiming_blocks -= num_blocks
            self._free_slots.append(slot)

    def retry(self) -> None:
        """Give back what an allocator failed to free."""
        if self._pinned and self._pinned[0][0] < self.num_landed_steps:
            self.land(self.num_landed_steps - 1)


def _edit(group: CacheAllocator, request: Request) -> BlockTableEdit:
    first = max(request.num_sent_blocks, group.num_released_blocks(request))
    return BlockTableEdit(request.slot, first, tuple(group.block_table(request)[first:]))
