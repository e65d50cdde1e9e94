"""KV of preempted requests in host memory: what is worth keeping there, what the next step copies. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmkit.types import BlockCopies, Request


@dataclass(frozen=True, slots=True)
class SwapCosts:
    """Seconds, measured: to compute one token of a prompt; to copy n blocks to the host and back again,
    `seconds_per_swap + n * seconds_per_block`."""

    seconds_per_token: float
    seconds_per_swap: float
    seconds_per_block: float

    def favours_swap(self, num_tokens: int, num_blocks: int) -> bool:
        """Whether copying `num_blocks` out and in takes less time than computing their `num_tokens` again."""
        copying = self.seconds_per_swap + num_blocks * self.seconds_per_block
        return copying < num_tokens * self.seconds_per_token


@dataclass(slots=True, eq=False)
class Kept:
    """KV of the first `num_tokens` of a request, in `host_blocks`, once step `step_id` has saved it.

    Until a step is told to, `blocks` say where in the pool it stands. `num_reused_blocks` it does not need when it
    comes back, since they are still in the pool.
    """

    num_tokens: int
    host_blocks: tuple[int, ...]
    blocks: tuple[int, ...]
    step_id: int = -1
    num_reused_blocks: int = 0


class HostPool:
    """Lends out blocks of host memory to requests that were preempted, until they run again or end.

    A step first saves, then restores, then runs. So blocks of the pool may be lent out anew before they are saved, and
    blocks of the host as soon as the step that restores them is planned.
    """

    def __init__(self, num_blocks: int, block_size: int, costs: SwapCosts) -> None:
        self.num_blocks = num_blocks
        self.costs = costs
        self._block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._kept: dict[Request, Kept] = {}
        self._to_save: dict[Request, Kept] = {}

    @property
    def has_to_save(self) -> bool:
        """Whether the next step has something to save."""
        return bool(self._to_save)

    def save(self, request: Request, table: Sequence[int]) -> None:
        """`request` is about to give up the blocks of `table`: keep what is computed, if there is room and it pays."""
        num_tokens = request.num_computed_tokens
        num_blocks = -(-num_tokens // self._block_size)
        if num_blocks > len(self._free) or not self.costs.favours_swap(num_tokens, num_blocks):
            return
        host_blocks = tuple([self._free.pop() for _ in range(num_blocks)])
        self._kept[request] = self._to_save[request] = Kept(num_tokens, host_blocks, tuple(table[:num_blocks]))

    def num_tokens(self, request: Request) -> int:
        """Leading tokens of a waiting request whose KV is kept."""
        kept = self._kept.get(request)
        return kept.num_tokens if kept is not None else 0

    def start(self, request: Request, num_cached_tokens: int) -> None:
        """`request` is about to run again; the pool still has the KV of `num_cached_tokens`."""
        kept = self._kept.get(request)
        if kept is not None:
            kept.num_reused_blocks = num_cached_tokens // self._block_size

    def copies(self, step_id: int, started: Iterable[tuple[Request, Sequence[int]]]) -> BlockCopies | None:
        """What step `step_id` copies; `started` are requests that run again in it, with their block tables."""
        saves = [pair for kept in self._to_save.values() for pair in zip(kept.blocks, kept.host_blocks, strict=True)]
        for kept in self._to_save.values():
            kept.step_id = step_id
        self._to_save.clear()
        restores: list[tuple[int, int]] = []
        for request, table in started:
            back = self._kept.get(request)
            if back is not None:
                restores += list(zip(back.host_blocks, table, strict=False))[back.num_reused_blocks :]
                self.drop(request)
        return BlockCopies(tuple(saves), tuple(restores)) if saves or restores else None

    def drop(self, request: Request) -> None:
        """What is kept of `request`, if anything, is needed no more."""
        kept = self._kept.pop(request, None)
        if kept is not None:
            self._free += reversed(kept.host_blocks)
            self._to_save.pop(request, None)

    def forget(self, step_id: int) -> None:
        """Step `step_id` has failed: what it was to save is lost."""
        for request in [request for request, kept in self._kept.items() if kept.step_id == step_id]:
            self.drop(request)

    def check(self, waiting: Iterable[Request]) -> None:
        """Raise AssertionError on a broken invariant; `waiting` are all requests that wait."""
        lent = [block for kept in self._kept.values() for block in kept.host_blocks]
        assert sorted(lent + self._free) == list(range(self.num_blocks)), f"host blocks {lent} lent, {self._free} free"
        assert self._kept.keys() <= set(waiting), "host memory is kept for a request that does not wait"
        assert self._to_save.items() <= self._kept.items(), "something is to be saved that nobody keeps"
        for request, kept in self._kept.items():
            assert 0 < kept.num_tokens < request.num_tokens, f"{kept.num_tokens} of {request.num_tokens} tokens kept"
            assert len(kept.host_blocks) == len(kept.blocks) == -(-kept.num_tokens // self._block_size), f"{kept}"
