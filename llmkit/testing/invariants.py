"""What must hold between any two steps, whatever the scheduler does. AssertionError says what does not."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.engine.planner import Planner
from llmkit.engine.residency import Residency
from llmkit.interfaces.cache import CacheAllocator
from llmkit.testing.oracle import OracleExecutor
from llmkit.types import Request, RequestStatus, StepPlan


def check_planner(planner: Planner, in_flight: Sequence[StepPlan], settles: bool = True) -> None:
    """Check queues, slots, blocks and token counts; `in_flight` are the plans launched but not landed.

    Token counts lag behind while steps repeat; without `settles` they are left so and not looked at, nor are the
    allocator's own books: its tables and its census are.
    """
    held = [view for views in planner._held.values() for view in views]
    assert planner._held.keys() <= planner.requests.keys(), "requests are held back for one that has ended"
    waiting = [view._request for view in (*planner._waiting, *held)]
    running = [view._request for view in planner._running]
    ids = [request.request_id for request in waiting + running]
    is_right = len(ids) == len(planner.requests) and planner.requests.keys() == set(ids)
    assert is_right, f"queues hold {sorted(ids)}, live are {sorted(planner.requests)}"
    if settles:
        planner.allocator.check()
        for request in waiting:
            _check_waiting(request)
        if planner.host is not None:
            planner.host.check(waiting)
        planner.settle()
        _check_counts(planner, running, in_flight)
    _check_residency(planner._residency, running)


def _check_counts(planner: Planner, running: list[Request], in_flight: Sequence[StepPlan]) -> None:
    rows: dict[tuple[str, int], list[int]] = {}
    for plan in in_flight:
        for row in plan.scheduled:
            counts = rows.setdefault((row.request_id, row.epoch), [0, 0])
            counts[0] += row.num_tokens
            counts[1] += row.samples
    for request in running:
        _check_running(request, planner, rows.get((request.request_id, request.epoch), [0, 0]))
    written = sum(request.num_computed_tokens + request.num_in_flight_tokens for request in running)
    unwritten = sum(request.num_blocks for request in running) * planner.allocator.spec.block_size - written
    assert planner.num_unwritten_slots == unwritten, f"{planner.num_unwritten_slots} slots unwritten, not {unwritten}"


def check_empty(planner: Planner) -> None:
    """Nothing is left behind once every request has ended and every step has landed."""
    assert not planner.requests and not planner.num_waiting and not planner.num_running, "requests are left over"
    stats = planner.allocator.stats()
    assert not stats.num_used_blocks, f"{stats.num_used_blocks} blocks never came back: {planner.allocator.census()}"
    residency = planner._residency
    assert not residency.num_reclaiming_blocks, f"{residency.num_reclaiming_blocks} blocks are still awaited"
    most = planner.scheduler.settings.max_num_seqs
    assert residency.num_free_slots == most, f"{residency.num_free_slots} of {most} slots came back"


def _check_waiting(request: Request) -> None:
    name = request.request_id
    assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), f"{name} waits as {request.status}"
    held = request.slot + 1, request.num_blocks, request.num_computed_tokens, request.num_in_flight_tokens
    assert not any(held), f"{name} waits, but keeps slot + 1, blocks, computed, in flight = {held}"
    assert not request.num_pending_samples, f"{name} waits, but {request.num_pending_samples} samples are pending"


def _check_running(request: Request, planner: Planner, in_flight: list[int]) -> None:
    name, block_size = request.request_id, planner.allocator.spec.block_size
    assert request.status is RequestStatus.RUNNING, f"{name} runs as {request.status}"
    table = planner.allocator.block_table(request)
    _check_released(request, planner.allocator)
    assert len(table) == request.num_blocks, f"{name} counts {request.num_blocks} blocks, its table has {len(table)}"
    counted = [request.num_in_flight_tokens, request.num_pending_samples]
    assert counted == in_flight, f"{name} counts {counted} tokens and samples in flight, there are {in_flight}"
    scheduled = request.num_computed_tokens + request.num_in_flight_tokens
    assert scheduled <= len(table) * block_size, f"{name}: {scheduled} tokens in {len(table)} blocks of {block_size}"
    known = request.num_tokens + request.num_pending_samples
    assert 0 < scheduled <= known, f"{name}: {scheduled} tokens scheduled of {known}"
    assert request.num_tokens < request.max_num_tokens, f"{name} runs on at its full length {request.max_num_tokens}"


def _check_released(request: Request, allocator: CacheAllocator) -> None:
    """What is held starts where the window of the next query does, and is bounded by it where the allocator says so."""
    spec, name, computed = allocator.spec, request.request_id, request.num_computed_tokens
    num_released, num_hidden = allocator.num_released_blocks(request), spec.num_hidden_blocks(computed)
    assert request.num_released_blocks == num_released, f"{name} counts {request.num_released_blocks} released blocks"
    assert num_released <= num_hidden, f"{name} released {num_released} blocks at {computed}, {num_hidden} are hidden"
    if allocator.max_num_tokens is None:
        assert num_released == num_hidden, f"{name} released {num_released} of {num_hidden} blocks behind its window"


def _check_residency(residency: Residency, running: list[Request]) -> None:
    pinned = [request for _, request, _ in residency._pinned]
    slots = [r.slot for r in running] + [slot for _, _, slot in residency._pinned] + residency._free_slots
    assert sorted(slots) == list(range(len(slots))), f"slots {slots}"
    _check_tables(residency.allocator, running + pinned)
    num_awaited = sum(len(_held_blocks(residency.allocator, request)) for request in pinned)
    assert residency.num_reclaiming_blocks == num_awaited, f"{residency.num_reclaiming_blocks} != {num_awaited}"


def _held_blocks(allocator: CacheAllocator, request: Request) -> Sequence[int]:
    """The entries of its block table that are its own."""
    return allocator.block_table(request)[allocator.num_released_blocks(request) :]


def _check_tables(allocator: CacheAllocator, holders: list[Request]) -> None:
    """The census counts every block exactly as often as tables of `holders` name it, and no table names one twice.

    One that several name is full: nobody writes there any more.
    """
    tables = {request.request_id: _held_blocks(allocator, request) for request in holders}
    census = allocator.census()
    if census == {block: (request_id,) for request_id, table in tables.items() for block in table}:
        num_named = sum(map(len, tables.values()))
        assert num_named == len(census), f"a block is named twice: {tables}"
        return
    owners: dict[int, list[str]] = {}
    for request_id, table in tables.items():
        assert len(set(table)) == len(table), f"{request_id} names a block twice: {list(table)}"
        for block in table:
            owners.setdefault(block, []).append(request_id)
    counted = {block: sorted(ids) for block, ids in census.items()}
    named = {block: sorted(ids) for block, ids in owners.items()}
    assert counted == named, f"the census counts {counted}, what runs or is awaited names {named}"
    for request in holders:
        num_full = request.num_computed_tokens // allocator.spec.block_size
        unfinished = allocator.block_table(request)[num_full:] if request.slot >= 0 else ()
        shared = [block for block in unfinished if len(owners[block]) > 1]
        assert not shared, f"{request.request_id} has yet to write into {shared}, which others hold as well"


def check_contents(planner: Planner, executor: OracleExecutor) -> None:
    """Every block a running request holds stands for its tokens, as far as they were computed, in the host's tables."""
    allocator = planner.allocator
    for view in planner._running:
        request = view._request
        end, tags = request.num_computed_tokens, executor.slots[request.slot].tags
        first = allocator.num_released_blocks(request) * allocator.spec.block_size
        found = executor.entries(_held_blocks(allocator, request), end - first)
        if found != tags[first:end]:
            wrong = [at for at, tag in enumerate(found, first) if tag != tags[at]]
            raise AssertionError(f"{request.request_id}: the tags at {wrong or len(found)} are not those of its tokens")
