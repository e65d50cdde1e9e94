"""What must hold between any two steps, whatever the scheduler does. AssertionError says what does not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from llmkit.engine.planner import Planner
from llmkit.engine.residency import Residency
from llmkit.types import Request, RequestStatus, StepPlan


def check_planner(planner: Planner, in_flight: Iterable[StepPlan]) -> None:
    """Check queues, slots, blocks and token counts; `in_flight` are the plans launched but not landed."""
    planner.settle()
    planner.allocator.check()
    waiting = [view._request for view in planner._waiting]
    running = [view._request for view in planner._running]
    ids = [request.request_id for request in waiting + running]
    assert len(ids) == len(set(ids)), f"a request stands in the queues twice: {ids}"
    assert set(ids) == planner.requests.keys(), f"queues hold {sorted(ids)}, live are {sorted(planner.requests)}"
    for request in waiting:
        _check_waiting(request)
    rows: defaultdict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for plan in in_flight:
        for row in plan.scheduled:
            counts = rows[row.request_id, row.epoch]
            counts[0] += row.num_tokens
            counts[1] += row.samples
    for request in running:
        _check_running(request, planner, rows[request.request_id, request.epoch])
    _check_residency(planner._residency, running)
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
    assert len(table) == request.num_blocks, f"{name} counts {request.num_blocks} blocks, its table has {len(table)}"
    counted = [request.num_in_flight_tokens, request.num_pending_samples]
    assert counted == in_flight, f"{name} counts {counted} tokens and samples in flight, there are {in_flight}"
    scheduled = request.num_computed_tokens + request.num_in_flight_tokens
    assert scheduled <= len(table) * block_size, f"{name}: {scheduled} tokens in {len(table)} blocks of {block_size}"
    known = request.num_tokens + request.num_pending_samples
    assert 0 < scheduled <= known, f"{name}: {scheduled} tokens scheduled of {known}"
    assert request.num_tokens < request.max_num_tokens, f"{name} runs on at its full length {request.max_num_tokens}"


def _check_residency(residency: Residency, running: list[Request]) -> None:
    pinned = [request for _, request, _ in residency._pinned]
    slots = Counter([r.slot for r in running] + [slot for _, _, slot in residency._pinned] + residency._free_slots)
    assert len(slots) == slots.total() and min(slots) == 0 and max(slots) == len(slots) - 1, f"slots: {slots}"
    owners = {request_id for ids in residency.allocator.census().values() for request_id in ids}
    strangers = owners - {request.request_id for request in running + pinned}
    assert not strangers, f"{sorted(strangers)} own blocks, but neither run nor wait for a step in flight"
    waiting_for = sum(len(residency.allocator.block_table(request)) for request in pinned)
    assert residency.num_reclaiming_blocks == waiting_for, f"{residency.num_reclaiming_blocks} != {waiting_for}"
