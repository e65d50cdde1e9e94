"""What must hold between any two steps, whatever the scheduler does. AssertionError says what does not."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.engine.planner import Planner
from llmkit.engine.residency import Residency
from llmkit.interfaces.cache import CacheAllocator
from llmkit.testing.oracle import OracleExecutor
from llmkit.types import Request, RequestStatus, StepPlan


class Books:
    """What was last found right, so that what has not changed since need not be looked at again.

    A planner moves no request and an allocator no block without a queue, a count of blocks or the number of slots
    showing it; `check_planner` looks at everything whenever one of them differs, and now and then all the same. What
    an allocator keeps for itself, cached blocks and free ones, is looked at when its census or its counts have changed.
    """

    def __init__(self) -> None:
        self._moved: tuple[object, ...] = ()
        self._counted: dict[CacheAllocator, tuple[object, ...]] = {}

    def has_moved(self, planner: Planner) -> bool:
        """Whether anything differs from the last call."""
        residency = planner._residency
        stats = [group.stats() for group in residency.groups] if residency.has_groups else planner.allocator.stats()
        moved = (
            stats, planner._running[:], planner._waiting[:], len(planner.requests),
            residency.num_held_blocks, residency.num_reclaiming_blocks, residency.num_free_slots,
        )  # fmt: skip
        is_same, self._moved = moved == self._moved, moved
        return not is_same

    def census(self, allocator: CacheAllocator, settles: bool) -> dict[int, tuple[str, ...]]:
        """The census of one group; AssertionError if the allocator's own books are wrong."""
        census = allocator.census()
        if settles:
            counted = census, allocator.stats()
            if counted != self._counted.get(allocator):
                allocator.check()
                self._counted[allocator] = {**census}, counted[1]
        return census


def check_planner(
    planner: Planner, in_flight: Sequence[StepPlan], settles: bool = True, books: Books | None = None
) -> None:
    """Check queues, slots, blocks and token counts; `in_flight` are the plans launched but not landed.

    Token counts lag behind while steps repeat; without `settles` they are left so and not looked at. `books` are those
    of the calls before, if there are any: then, without `settles`, only what has changed since is looked at.
    """
    if settles:
        planner.settle()
    books = books or Books()
    if not (books.has_moved(planner) or settles):
        return
    requests = planner.requests
    waiting = [view._request for view in planner._waiting]
    if planner._held:
        assert planner._held.keys() <= requests.keys(), "requests are held back for one that has ended"
        waiting += [view._request for views in planner._held.values() for view in views]
    running = [view._request for view in planner._running]
    ids = [request.request_id for request in waiting + running]
    is_right = len(ids) == len(requests) and requests.keys() == set(ids)
    assert is_right, f"queues hold {sorted(ids)}, live are {sorted(requests)}"
    if settles:
        for request in waiting:
            _check_waiting(request)
        if planner.host is not None:
            planner.host.check(waiting)
        _check_counts(planner, running, in_flight)
    _check_residency(planner._residency, running, books, settles)


def _check_counts(planner: Planner, running: list[Request], in_flight: Sequence[StepPlan]) -> None:
    rows: dict[tuple[str, int], tuple[int, int]] = {}
    groups = planner._residency.groups
    for plan in in_flight:
        for request_id, _, _, num_tokens, samples, epoch in plan.scheduled:
            counts = rows.get((request_id, epoch), (0, 0))
            rows[request_id, epoch] = counts[0] + num_tokens, counts[1] + samples
    num_blocks = written = 0
    for request in running:
        _check_running(request, groups, rows.get((request.request_id, request.epoch), (0, 0)))
        num_blocks += request.num_blocks
        written += request.num_computed_tokens + request.num_in_flight_tokens
    unwritten = num_blocks * planner.allocator.spec.block_size - written
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


def _check_waiting(request: Request) -> None:
    name, status = request.request_id, request.status
    assert status is RequestStatus.WAITING or status is RequestStatus.PREEMPTED, f"{name} waits as {status}"
    assert request.slot == -1 and not request.num_blocks, (
        f"{name} waits, but keeps its slot or {request.num_blocks} blocks"
    )
    num_tokens = request.num_computed_tokens or request.num_in_flight_tokens or request.num_pending_samples
    assert not num_tokens, f"{name} waits, but {num_tokens} tokens count as computed, in flight or pending"


def _check_running(request: Request, groups: Sequence[CacheAllocator], in_flight: tuple[int, int]) -> None:
    name, block_size, num_blocks = request.request_id, groups[0].spec.block_size, request.num_blocks
    assert request.status is RequestStatus.RUNNING, f"{name} runs as {request.status}"
    num_released = groups[0].num_released_blocks(request)
    assert request.num_released_blocks == num_released, f"{name} counts {request.num_released_blocks} released blocks"
    for group in groups:
        _check_released(request, group)
        num_held = len(group.block_table(request))
        assert num_held == num_blocks, f"{name} counts {num_blocks} blocks, its table has {num_held}"
    counted = request.num_in_flight_tokens, request.num_pending_samples
    assert counted == in_flight, f"{name} counts {counted} tokens and samples in flight, there are {in_flight}"
    scheduled = request.num_computed_tokens + request.num_in_flight_tokens
    assert scheduled <= num_blocks * block_size, f"{name}: {scheduled} tokens in {num_blocks} blocks of {block_size}"
    known = request.num_tokens + request.num_pending_samples
    assert 0 < scheduled <= known, f"{name}: {scheduled} tokens scheduled of {known}"
    assert request.num_tokens < request.max_num_tokens, f"{name} runs on at its full length {request.max_num_tokens}"


def _check_released(request: Request, allocator: CacheAllocator) -> None:
    """What is held starts where the window of the next query does, and is bounded by it where the allocator says so."""
    spec, name, computed = allocator.spec, request.request_id, request.num_computed_tokens
    num_released, num_hidden = allocator.num_released_blocks(request), spec.num_hidden_blocks(computed)
    assert num_released <= num_hidden, f"{name} released {num_released} blocks at {computed}, {num_hidden} are hidden"
    if num_hidden and allocator.max_num_tokens is None:
        assert num_released == num_hidden, f"{name} released {num_released} of {num_hidden} blocks behind its window"


def _check_residency(residency: Residency, running: list[Request], books: Books, settles: bool) -> None:
    """Every slot is one request's or free; the census counts every block exactly as often as tables name it."""
    slots = [*residency._free_slots, *[request.slot for request in running], *[slot for *_, slot in residency._pinned]]
    is_right = len(set(slots)) == len(slots) == max(slots) + 1 and min(slots) == 0
    assert is_right, f"slots {sorted(slots)}"
    awaited = [request for _, request, _ in residency._pinned]
    num_awaited = sum([len(held_blocks(residency.allocator, request)) for request in awaited])
    assert residency.num_reclaiming_blocks == num_awaited, f"{residency.num_reclaiming_blocks} != {num_awaited}"
    for group in residency.groups:
        _check_tables(group, running, awaited, books.census(group, settles))


def _check_tables(
    allocator: CacheAllocator, running: list[Request], awaited: list[Request], census: dict[int, tuple[str, ...]]
) -> None:
    named: dict[int, tuple[str, ...]] = {}
    num_named = 0
    for request in [*running, *awaited] if awaited else running:
        table = held_blocks(allocator, request)
        named.update(dict.fromkeys(table, (request.request_id,)))
        num_named += len(table)
    if named != census or num_named != len(census):
        _check_sharing(allocator, running, awaited, census)


def held_blocks(allocator: CacheAllocator, request: Request) -> Sequence[int]:
    """The entries of its block table that are its own."""
    num_released = allocator.num_released_blocks(request)
    return allocator.block_table(request)[num_released:] if num_released else allocator.block_table(request)


def _check_sharing(
    allocator: CacheAllocator, running: list[Request], awaited: list[Request], census: dict[int, tuple[str, ...]]
) -> None:
    """The same where blocks have several owners; no table names one twice.

    One that several name is full: nobody writes there any more.
    """
    owners: dict[int, list[str]] = {}
    for request in [*running, *awaited]:
        table = held_blocks(allocator, request)
        assert len(set(table)) == len(table), f"{request.request_id} names a block twice: {list(table)}"
        for block in table:
            owners.setdefault(block, []).append(request.request_id)
    counted = {block: sorted(ids) for block, ids in census.items()}
    named = {block: sorted(ids) for block, ids in owners.items()}
    assert counted == named, f"the census counts {counted}, what runs or is awaited names {named}"
    for request in running:
        num_full = request.num_computed_tokens // allocator.spec.block_size
        unfinished = allocator.block_table(request)[num_full:]
        shared = [block for block in unfinished if len(owners[block]) > 1]
        assert not shared, f"{request.request_id} has yet to write into {shared}, which others hold as well"


def check_contents(planner: Planner, executors: Sequence[OracleExecutor]) -> None:
    """Every block a running request holds stands for its tokens, as far as they were computed, in the host's tables.

    There is one executor for each group of layers.
    """
    for group, executor in zip(planner._residency.groups, executors, strict=True):
        _check_group(planner, group, executor)


def _check_group(planner: Planner, allocator: CacheAllocator, executor: OracleExecutor) -> None:
    block_size = allocator.spec.block_size
    for view in planner._running:
        request = view._request
        end, tags = request.num_computed_tokens, executor.slots[request.slot].tags
        first = allocator.num_released_blocks(request) * block_size
        found = executor.entries(held_blocks(allocator, request), end - first)
        if found != tags[first:end]:
            wrong = [at for at, tag in enumerate(found, first) if tag != tags[at]]
            raise AssertionError(f"{request.request_id}: the tags at {wrong or len(found)} are not those of its tokens")
