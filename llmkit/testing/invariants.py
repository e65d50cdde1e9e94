"""What must hold between any two steps, whatever the scheduler does. AssertionError says what does not."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.engine.planner import Planner
from llmkit.interfaces.cache import CacheAllocator, CacheStats
from llmkit.testing.oracle import OracleExecutor
from llmkit.types import Request, RequestStatus, StepPlan

Held = list[tuple[Request, Sequence[int], int]]
"""Requests with their block tables, and how many leading entries of those are released."""


class Books:
    """What was last found right, so that what has not changed since need not be looked at again.

    A planner moves no request and an allocator no block without a queue, a count of blocks or the number of slots
    showing it; `check_planner` looks at everything whenever one of them differs, and now and then all the same. What
    an allocator keeps for itself, cached blocks and free ones, is looked at when its census or its counts have changed.
    """

    def __init__(self) -> None:
        self._stats: list[CacheStats] = []
        self._moved: tuple[object, ...] = ()
        self._counted: dict[CacheAllocator, tuple[CacheStats, dict[int, tuple[str, ...]]]] = {}

    def has_moved(self, planner: Planner) -> bool:
        """Whether anything differs from the last call."""
        residency = planner._residency
        self._stats = [group.stats() for group in residency.groups]
        moved = (
            self._stats, planner._running[:], planner._waiting[:], len(planner.requests),
            residency.num_held_blocks, residency.num_reclaiming_blocks, residency.num_free_slots,
        )  # fmt: skip
        is_same, self._moved = moved == self._moved, moved
        return not is_same

    def census(self, number: int, group: CacheAllocator, settles: bool) -> dict[int, tuple[str, ...]]:
        """The census of the group of that number; AssertionError if the allocator's own books are wrong."""
        census = group.census()
        if settles:
            counted = self._stats[number], census
            if counted != self._counted.get(group):
                group.check()
                self._counted[group] = self._stats[number], {**census}
        return census


def check_planner(
    planner: Planner,
    in_flight: Sequence[StepPlan],
    settles: bool = True,
    books: Books | None = None,
    executors: Sequence[OracleExecutor] = (),
) -> None:
    """Check queues, slots, blocks and token counts; `in_flight` are the plans launched but not landed.

    Token counts lag behind while steps repeat; without `settles` they are left so and not looked at. `books` are those
    of the calls before, if there are any: then, without `settles`, only what has changed since is looked at.
    With `executors`, one for each group of layers, every block a running request holds must stand for its tokens, as
    far as they were computed, in the host's tables.
    """
    if settles:
        planner.settle()
    books, groups = books or Books(), planner._residency.groups
    running = [_held(group, [view._request for view in planner._running]) for group in groups]
    if books.has_moved(planner) or settles:
        waiting = _check_queues(planner)
        if settles:
            _check_waiting(waiting)
            if planner.host is not None:
                planner.host.check(waiting)
            _check_counts(planner, running, in_flight)
        _check_residency(planner, running, books, settles)
    if executors:
        for held, group, executor in zip(running, groups, executors, strict=True):
            _check_contents(held, group.spec.block_size, executor)


def _held(group: CacheAllocator, requests: list[Request]) -> Held:
    return [(request, group.block_table(request), group.num_released_blocks(request)) for request in requests]


def _check_queues(planner: Planner) -> list[Request]:
    """Every live request is in one queue; those that wait."""
    requests, waiting = planner.requests, [view._request for view in planner._waiting]
    if planner._held:
        assert planner._held.keys() <= requests.keys(), "requests are held back for one that has ended"
        waiting += [view._request for views in planner._held.values() for view in views]
    ids = [request.request_id for request in waiting] + [view._request.request_id for view in planner._running]
    is_right = len(ids) == len(requests) and requests.keys() == set(ids)
    assert is_right, f"queues hold {sorted(ids)}, live are {sorted(requests)}"
    return waiting


def _check_counts(planner: Planner, running: list[Held], in_flight: Sequence[StepPlan]) -> None:
    rows: dict[tuple[str, int], tuple[int, int]] = {}
    for plan in in_flight:
        for request_id, _, _, num_tokens, samples, epoch in plan.scheduled:
            counts = rows.get((request_id, epoch), (0, 0))
            rows[request_id, epoch] = counts[0] + num_tokens, counts[1] + samples
    groups, block_size = planner._residency.groups, planner.allocator.spec.block_size
    num_blocks = written = 0
    for request, table, num_released in running[0]:
        counts = rows.get((request.request_id, request.epoch), (0, 0)) if rows else (0, 0)
        _check_running(request, len(table) * block_size, counts)
        name = request.request_id
        assert request.num_released_blocks == num_released, f"{name} counts {request.num_released_blocks} released"
        num_blocks += request.num_blocks
        written += request.num_computed_tokens + request.num_in_flight_tokens
    for held, group in zip(running, groups, strict=True):
        _check_released(held, group)
    unwritten = num_blocks * block_size - written
    assert planner.num_unwritten_slots == unwritten, f"{planner.num_unwritten_slots} slots unwritten, not {unwritten}"


def check_empty(planner: Planner) -> None:
    """Nothing is left behind once every request has ended and every step has landed."""
    assert not planner.requests and not planner.num_waiting and not planner.num_running, "requests are left over"
    residency = planner._residency
    for group in residency.groups:
        num_used = group.stats().num_used_blocks
        assert not num_used, f"{num_used} blocks never came back: {group.census()}"
    assert not residency.num_reclaiming_blocks, f"{residency.num_reclaiming_blocks} blocks are still awaited"
    most = planner.scheduler.settings.max_num_seqs
    assert residency.num_free_slots == most, f"{residency.num_free_slots} of {most} slots came back"


def _check_waiting(waiting: list[Request]) -> None:
    for request in waiting:
        name, status = request.request_id, request.status
        assert status is RequestStatus.WAITING or status is RequestStatus.PREEMPTED, f"{name} waits as {status}"
        assert request.slot == -1 and not request.num_blocks, f"{name} waits, but keeps its slot or blocks"
        num_tokens = request.num_computed_tokens or request.num_in_flight_tokens or request.num_pending_samples
        assert not num_tokens, f"{name} waits, but {num_tokens} tokens count as computed, in flight or pending"


def _check_running(request: Request, reach: int, in_flight: tuple[int, int]) -> None:
    """Blocks of `request` reach up to position `reach`."""
    name = request.request_id
    assert request.status is RequestStatus.RUNNING, f"{name} runs as {request.status}"
    counted = request.num_in_flight_tokens, request.num_pending_samples
    assert counted == in_flight, f"{name} counts {counted} tokens and samples in flight, there are {in_flight}"
    scheduled = request.num_computed_tokens + request.num_in_flight_tokens
    assert scheduled <= reach, f"{name}: {scheduled} tokens in blocks for {reach}"
    known = request.num_tokens + request.num_pending_samples
    assert 0 < scheduled <= known, f"{name}: {scheduled} tokens scheduled of {known}"
    assert request.num_tokens < request.max_num_tokens, f"{name} runs on at its full length {request.max_num_tokens}"


def _check_released(running: Held, group: CacheAllocator) -> None:
    """What is held starts where the window of the next query does, and is bounded by it where the allocator says so."""
    spec, is_bound = group.spec, group.max_num_tokens is None
    for request, table, num_released in running:
        name, num_blocks, computed = request.request_id, request.num_blocks, request.num_computed_tokens
        assert len(table) == num_blocks, f"{name} counts {num_blocks} blocks, its table has {len(table)}"
        num_hidden = spec.num_hidden_blocks(computed)
        assert num_released <= num_hidden, f"{name} released {num_released} blocks at {computed} of {num_hidden} hidden"
        is_right = num_released == num_hidden or not is_bound
        assert is_right, f"{name} released {num_released} of {num_hidden} blocks behind its window"


def _check_residency(planner: Planner, running: list[Held], books: Books, settles: bool) -> None:
    """Every slot is one request's or free; the census counts every block exactly as often as tables name it."""
    residency, num_slots = planner._residency, planner.scheduler.settings.max_num_seqs
    slots = residency._free_slots + [request.slot for request, _, _ in running[0]]
    slots += [slot for _, _, slot in residency._pinned]
    assert sorted(slots) == [*range(num_slots)], f"slots {sorted(slots)} of {num_slots}"
    pinned = [request for _, request, _ in residency._pinned]
    awaited = [_held(group, pinned) if pinned else [] for group in residency.groups]
    num_awaited = sum([len(table) - num_released for _, table, num_released in awaited[0]])
    assert residency.num_reclaiming_blocks == num_awaited, f"{residency.num_reclaiming_blocks} != {num_awaited}"
    for number, group in enumerate(residency.groups):
        _check_tables(group, running[number], awaited[number], books.census(number, group, settles))


def _check_tables(group: CacheAllocator, running: Held, awaited: Held, census: dict[int, tuple[str, ...]]) -> None:
    named: dict[int, tuple[str, ...]] = {}
    num_named = 0
    for request, table, num_released in running + awaited:
        named.update(dict.fromkeys(table[num_released:] if num_released else table, (request.request_id,)))
        num_named += len(table) - num_released
    if named != census or num_named != len(census):
        _check_sharing(group, running, awaited, census)


def _check_sharing(group: CacheAllocator, running: Held, awaited: Held, census: dict[int, tuple[str, ...]]) -> None:
    """The same where blocks have several owners; no table names one twice.

    One that several name is full: nobody writes there any more.
    """
    owners: dict[int, list[str]] = {}
    for request, table, num_released in [*running, *awaited]:
        held = table[num_released:]
        assert len(set(held)) == len(held), f"{request.request_id} names a block twice: {list(held)}"
        for block in held:
            owners.setdefault(block, []).append(request.request_id)
    counted = {block: sorted(ids) for block, ids in census.items()}
    named = {block: sorted(ids) for block, ids in owners.items()}
    assert counted == named, f"the census counts {counted}, what runs or is awaited names {named}"
    for request, table, _ in running:
        num_full = request.num_computed_tokens // group.spec.block_size
        shared = [block for block in table[num_full:] if len(owners[block]) > 1]
        assert not shared, f"{request.request_id} has yet to write into {shared}, which others hold as well"


def _check_contents(running: Held, block_size: int, executor: OracleExecutor) -> None:
    for request, table, num_released in running:
        end, tags = request.num_computed_tokens, executor.slots[request.slot].tags
        first = num_released * block_size
        found = executor.entries(table[num_released:] if num_released else table, end - first)
        if found != tags[first:end]:
            wrong = [at for at, tag in enumerate(found, first) if tag != tags[at]]
            raise AssertionError(f"{request.request_id}: the tags at {wrong or len(found)} are not those of its tokens")
