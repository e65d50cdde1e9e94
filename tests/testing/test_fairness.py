"""Promises of fairness are held against every step: planted unfair schedulers, and bugs in fair ones, are found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from llmkit import ContinuousBatching, RequestView, Scheduler
from llmkit.engine.planner import Planner
from llmkit.testing import ReferenceCache, check_scheduler
from llmkit.testing.fairness import Fairness
from llmkit.testing.machine import walk_machine
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous
from llmkit_schedulers.deadline import Deadline
from llmkit_schedulers.fair import Fair
from llmkit_schedulers.prefix_aware import PrefixAware
from llmkit_schedulers.priority import Priority
from llmkit_schedulers.sjf import ShortestJobFirst
from llmkit_schedulers.static import Static
from tests.schedulers.test_conformance import OPTIONS
from tests.testing.test_mutants import Bug, plant

QUICK = settings(
    max_examples=200, stateful_step_count=30, deadline=None, derandomize=True, database=None,
    phases=[Phase.generate], report_multiple_bugs=False,
)  # fmt: skip


class Favouring(ContinuousBatching):
    """One tenant always goes first, though all are to have equal shares."""

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterable[RequestView]:
        return sorted(waiting, key=lambda request: request.tenant)

    def service(self, request: RequestView) -> float:
        return request.num_service_tokens


class Latest(ContinuousBatching):
    """Who came last goes first, though nobody may be passed over for more than `bound` seconds."""

    bound: ClassVar[float] = 3.0

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterable[RequestView]:
        return sorted(waiting, key=lambda request: -request.arrival_time)

    def may_pass(self, started: RequestView, waiting: RequestView, now: float) -> bool:
        return started.arrival_time <= waiting.arrival_time + self.bound


class Shrinking(ContinuousBatching):
    """What it counts goes back to nothing with each preemption."""

    def service(self, request: RequestView) -> float:
        return request.num_computed_tokens


UNFAIR: dict[type[Scheduler], str] = {
    Favouring: r"tenant '' got \d+ ahead of 'a', which has been waiting as well: \d+ at most",
    Latest: "which it may not pass",
    Shrinking: r"has had 0, and \d+ a step before",
}


@pytest.mark.parametrize("scheduler", UNFAIR)
def test_broken_promises_are_found(scheduler: type[Scheduler]) -> None:
    with pytest.raises(AssertionError, match=UNFAIR[scheduler]):
        check_scheduler(scheduler)


@pytest.mark.parametrize("scheduler", [Favouring, Latest])
def test_the_machine_finds_them_too(scheduler: type[Scheduler]) -> None:
    with pytest.raises(AssertionError, match=UNFAIR[scheduler]):
        run_state_machine_as_test(walk_machine(scheduler, ReferenceCache), settings=QUICK)


def test_who_promises_nothing_may_do_all_of_that(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheduler in (Favouring, Shrinking):
        monkeypatch.setattr(scheduler, "service", Scheduler.service)
        check_scheduler(scheduler, seeds=range(10))
    monkeypatch.delattr(Latest, "may_pass")
    check_scheduler(Latest, seeds=range(10))


def test_what_starts_and_ends_within_a_step_counts() -> None:
    check_scheduler(Fair, caches=[PagedCache], depths=[0], seeds=[1731])


def test_tenants_are_compared_often(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, compare = [], Fairness._compare

    def counting(self: Fairness, tenants: set[str]) -> None:
        sizes.append(len(tenants))
        compare(self, tenants)

    monkeypatch.setattr(Fairness, "_compare", counting)
    coverage = check_scheduler(Fair, caches=[PagedCache], seeds=range(20))
    assert len(sizes) == coverage.num_steps and sizes.count(2) > 500


BUGS: dict[str, tuple[Bug, type[Scheduler]]] = {
    "the last of the queue goes first": (
        (ContinuousBatching.order_waiting, "return waiting", "return waiting[::-1]"), Continuous),
    "who was preempted goes last": (
        (Planner._update_queues, "self._waiting.insert(0, view)", "self._waiting.append(view)"), Static),
    "priority: waiting is worth nothing": ((Priority.rank, "request.arrival_time / ", "0.0 * "), Priority),
    "sjf: the delay has no bound": (
        (ShortestJobFirst.rank, ", self.settings.max_seconds)", ", 1e9)"), ShortestJobFirst),
    "prefix_aware: no bound on waiting": (
        (PrefixAware.order_waiting, "self.settings.max_wait_seconds", "1e9"), PrefixAware),
    "deadline: who came first goes first": (
        (Deadline.order_waiting, "sorted(waiting, key=self.rank)", "waiting"), Deadline),
    "fair: the most served goes first": ((Fair.order_waiting, "min(queues, ", "max(queues, "), Fair),
    "fair: nothing is counted": ((Fair._charge, "self.service(request) - before", "0.0"), Fair),
    "fair: absence saves up": ((Fair._charge, "max(kept.get(t, 0.0), self._floor)", "kept.get(t, 0.0)"), Fair),
    "fair: who only runs has not been away": (
        (Fair._left_waiting, "RUNNING}", "RUNNING} | {one.tenant for one in queue.running}"), Fair),
    "fair: the first step of a request is free": (
        (Fair.order_waiting, "self._charged[request] = self.service(request)", "pass"), Fair),
}  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("bug", BUGS)
def test_walks_find_what_is_unfair(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, scheduler = BUGS[bug]
    plant(monkeypatch, planted)
    with pytest.raises(AssertionError, match="seed"):
        check_scheduler(scheduler, options=OPTIONS.get(scheduler, {}), caches=[PagedCache], seeds=range(60))
