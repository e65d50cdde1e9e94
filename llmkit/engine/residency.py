"""Which requests are on the device: their slots and blocks, and those still pinned by a step in flight. Torch-free."""

from __future__ import annotations

from collections import deque

from llmkit.interfaces.cache import CacheAllocator
from llmkit.types import BlockTableEdit, Request


class Residency:
    """Lends out slots and blocks, and takes them back only after the last step in flight that names them.

    `num_held_blocks` and `num_scheduled_tokens` (computed or in flight) are those of all requests on the device.
    """

    def __init__(self, allocator: CacheAllocator, max_num_seqs: int) -> None:
        self.allocator = allocator
        self.block_size = allocator.spec.block_size
        self.num_landed_steps = 0
        self.num_reclaiming_blocks = 0
        self.num_held_blocks = 0
        self.num_scheduled_tokens = 0
        self._num_stays = 0
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._pinned: deque[tuple[int, Request, int]] = deque()

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_unowned_blocks(self) -> int:
        return self.allocator.stats().num_unowned_blocks

    def reserve(self, request: Request, upto: int) -> bool:
        """Cover positions below `upto` with blocks; all or nothing."""
        if not self.allocator.allocate(request, upto):
            return False
        num_blocks = len(self.allocator.block_table(request))
        self.num_held_blocks += num_blocks - request.num_blocks
        request.num_blocks = num_blocks
        return True

    def edit(self, request: Request) -> BlockTableEdit:
        """The blocks of `request` that the device does not know yet; from now on it does."""
        first, request.num_sent_blocks = request.num_sent_blocks, request.num_blocks
        return BlockTableEdit(request.slot, first, tuple(self.allocator.block_table(request)[first:]))

    def enter(self, request: Request) -> None:
        """Give `request` a slot and an epoch of its own; the caller has checked that a slot is free."""
        request.slot = self._free_slots.pop()
        self._num_stays += 1
        request.epoch = self._num_stays

    def leave(self, request: Request) -> int:
        """Take `request` off the device: its results in flight go stale. Returns the blocks free at once."""
        num_blocks, slot = request.num_blocks, request.slot
        self.num_held_blocks -= num_blocks
        self.num_scheduled_tokens -= request.num_computed_tokens + request.num_in_flight_tokens
        request.epoch, request.slot = 0, -1
        request.num_blocks = request.num_sent_blocks = 0
        request.num_computed_tokens = request.num_in_flight_tokens = request.num_pending_samples = 0
        if request.last_step_id >= self.num_landed_steps:
            self._pinned.append((request.last_step_id, request, slot))
            self.num_reclaiming_blocks += num_blocks
            return 0
        num_before = self.num_unowned_blocks
        self._give_back(request, slot)
        return self.num_unowned_blocks - num_before

    def is_pinned(self, request: Request) -> bool:
        """Whether blocks of an earlier stay under this id still wait for a step in flight."""
        return any(pinned.request_id == request.request_id for _, pinned, _ in self._pinned)

    def land(self, step_id: int) -> None:
        """Step `step_id` has run: give back what only it and earlier steps named."""
        self.num_landed_steps = step_id + 1
        while self._pinned and self._pinned[0][0] <= step_id:
            _, request, slot = self._pinned.popleft()
            self.num_reclaiming_blocks -= len(self.allocator.block_table(request))
            self._give_back(request, slot)

    def _give_back(self, request: Request, slot: int) -> None:
        self.allocator.free(request)
        self._free_slots.append(slot)
