"""The schedulers' tests bite: each of these seeded bugs is found by the test that is named beside it."""

from collections.abc import Callable
from typing import Any

import pytest

from llmkit import ContinuousBatching, DenialReason, RequestView, SchedulingStep
from llmkit.testing import check_scheduler
from llmkit_schedulers.deadline import Deadline
from llmkit_schedulers.fair import Fair
from llmkit_schedulers.prefix_aware import PrefixAware
from llmkit_schedulers.sjf import ShortestJobFirst
from tests.schedulers import test_deadline, test_fair, test_prefix_aware, test_sjf
from tests.testing.test_mutants import Bug, plant

Check = Callable[..., None]

BUGS: dict[str, tuple[Bug, Check]] = {
    "sjf: hints are ignored": (
        (ShortestJobFirst.rank, "request.length_hint or", ""),
        test_sjf.test_few_expected_tokens_go_first_and_ties_go_by_arrival),
    "sjf: the delay has no bound": (
        (ShortestJobFirst.rank, ", self.settings.max_seconds)", ", 1e9)"), test_sjf.test_the_bound_lets_nobody_starve),
    "sjf: the shortest gives way": (
        (ShortestJobFirst.victim, "max(", "min("), test_sjf.test_the_longest_gives_way_when_blocks_run_out),
    "fair: absence saves up": (
        (Fair._charge, "max(kept.get(t, 0.0), self._floor)", "kept.get(t, 0.0)"),
        test_fair.test_absence_saves_nothing_up),
    "fair: leaving clears a debt": (
        (Fair._charge, "if t in present or count > self._floor", "if t in present"),
        test_fair.test_leaving_clears_no_debt),
    "fair: an empty queue forgets who was there": (
        (Fair._charge, "stayed or self._latest", "stayed"), test_fair.test_absence_saves_nothing_up_while_nobody_waits),
    "fair: who only runs has not been away": (
        (Fair._left_waiting, "RUNNING}", "RUNNING} | {one.tenant for one in queue.running}"),
        test_fair.test_a_tenant_that_only_runs_is_away_as_well),
    "fair: who has nobody left waiting has not been away": (
        (Fair._left_waiting, "if request.status is not RequestStatus.RUNNING", ""),
        test_fair.test_a_tenant_whose_requests_start_at_once_saves_nothing_up),
    "fair: counters are kept for ever": (
        (Fair._charge, "if t in present or count > self._floor", ""),
        test_fair.test_tenants_that_owe_nothing_are_forgotten),
    "fair: what is admitted counts in the next step only": (
        (Fair.order_waiting, "counters[tenant] += request.num_tokens", "pass"),
        test_fair.test_tenants_take_turns_within_a_step_and_ties_go_by_arrival),
    "fair: the first step of a request is free": (
        (Fair.order_waiting, "self._charged[request] = self.service(request)", "pass"),
        test_fair.test_the_least_served_goes_first),
    "fair: output tokens weigh nothing more": (
        (Fair.service, "(self._weight - 1.0)", "0.0"), test_fair.test_output_tokens_weigh_more_than_prompt_tokens),
    "deadline: who ran is refused": (
        (Deadline.admit, "or request.status is not RequestStatus.WAITING", ""),
        test_deadline.test_nobody_who_ever_ran_is_refused),
    "deadline: the hopeless run": (
        (Deadline.admit, "* self._step_seconds", "* 0.0"),
        test_deadline.test_what_would_end_too_late_is_refused_when_its_turn_comes),
    "deadline: hints go beyond the limit": (
        (Deadline.admit, "min(request.length_hint or num_outputs, num_outputs)", "request.length_hint or num_outputs"),
        test_deadline.test_a_hint_beyond_what_a_request_may_produce_refuses_nobody),
    "deadline: idle time counts as a step": (
        (Deadline._measure, "if queue.running:", "if self._planned_at:"),
        test_deadline.test_idle_time_is_not_taken_for_a_slow_step),
    "deadline: no deadline means never": (
        (Deadline.rank, "request.arrival_time + self._implied", "1e9"),
        test_deadline.test_the_earliest_deadline_goes_first_and_none_means_an_implied_one),
    "deadline: the latest admitted gives way": (
        (Deadline.order_running, "sorted(running, key=self.rank)", "running"),
        test_deadline.test_whoever_is_due_last_gives_way_when_blocks_run_out),
    "prefix_aware: the shortest prefix first": (
        (PrefixAware.order_waiting, "-request.num_cached_tokens", "request.num_cached_tokens"),
        test_prefix_aware.test_the_longest_cached_prefix_goes_first_and_others_go_by_arrival),
    "prefix_aware: no bound on waiting": (
        (PrefixAware.order_waiting, "self.settings.max_wait_seconds", "1e9"),
        test_prefix_aware.test_the_bound_lets_nobody_starve),
    "prefix_aware: everybody is looked up": (
        (PrefixAware.order_waiting, "seen = waiting[:lookahead]", "seen, lookahead = waiting, len(waiting)"),
        test_prefix_aware.test_only_so_many_are_looked_up),
}  # fmt: skip

REST: dict[Check, dict[str, Any]] = {
    test_sjf.test_the_bound_lets_nobody_starve: {"depth": 0},
    test_fair.test_absence_saves_nothing_up: {"depth": 0},
    test_fair.test_output_tokens_weigh_more_than_prompt_tokens: {"weight": 9.0, "order": "abba"},
    test_deadline.test_what_would_end_too_late_is_refused_when_its_turn_comes: {"depth": 0},
    test_prefix_aware.test_the_bound_lets_nobody_starve: {"depth": 0},
}
"""Parameters that a test takes besides the stage."""


@pytest.mark.mutant
@pytest.mark.parametrize("name", BUGS)
def test_bugs_of_a_choice_are_found(name: str, make_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bug, check = BUGS[name]
    check(make_stage, **REST.get(check, {}))
    plant(monkeypatch, bug)
    with pytest.raises((AssertionError, KeyError)):  # a KeyError where somebody never ends
        check(make_stage, **REST.get(check, {}))


class Impatient(ContinuousBatching):
    """Refuses whoever still waits after three steps, with or without a deadline."""

    def admit(self, request: RequestView, step: SchedulingStep) -> bool:
        if step.now > request.arrival_time + 3:
            step.reject(request, DenialReason.TOO_LATE.value)
            return False
        return True


def test_the_kit_lets_nobody_be_refused_who_ran_or_has_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"has no deadline, but was refused|was refused, but it had run"):
        check_scheduler(Impatient, seeds=range(20))
    plant(monkeypatch, (Deadline.admit, "or request.status is not RequestStatus.WAITING", ""))
    with pytest.raises(AssertionError, match="was refused, but it had run: it would end after its deadline"):
        check_scheduler(Deadline, seeds=range(60))
