"""What a scheduler promises of fairness, held against every step: who may start before whom, and shares of tenants."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations

from llmkit.engine.planner import Planner
from llmkit.interfaces.scheduler import RequestView, Scheduler
from llmkit.types import RequestStatus, StepPlan

ROUNDING = 1e-6


@dataclass(slots=True)
class Fairness:
    """Asks `scheduler.may_pass` about who starts and whom that leaves waiting, and adds up `scheduler.service`.

    Of two tenants who both have requests left waiting by every step none may get far ahead of the other. What a tenant
    has had since it last started a request nobody could foresee then, and what others started beside it is still to
    come; so much, of both, may lie between them.
    """

    scheduler: Scheduler
    _waiting: list[RequestView] = field(default_factory=list)
    _had: dict[RequestView, float] = field(default_factory=dict)
    _totals: dict[str, float] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)
    _begun: dict[tuple[str, str], float] = field(default_factory=dict)

    def before_step(self, planner: Planner) -> None:
        """Note who waits."""
        self._waiting = planner._waiting[:]

    def after_step(self, planner: Planner, plan: StepPlan | None, now: float) -> None:
        """`plan` was made at `now`, None if there was nothing to run; AssertionError if a promise is broken."""
        admitted = {} if plan is None else {one.request_id: len(one.token_ids) for one in plan.admissions}
        started = {view: admitted[view.request_id] for view in self._waiting if view.request_id in admitted}
        left = [view for view in self._waiting if view not in started and view.status is not RequestStatus.FINISHED]
        for one in started:
            for other in left:
                may_pass = self.scheduler.may_pass(one, other, now)
                assert may_pass, f"{one.request_id} started before {other.request_id}, which it may not pass"
        if type(self.scheduler).service is not Scheduler.service:
            self._start(started)
            self._count(planner)
            self._compare({view.tenant for view in left})

    def _start(self, started: dict[RequestView, int]) -> None:
        """Tenants start requests of so many tokens, each before it knows what those of others will come to."""
        for tenant in {view.tenant for view in started}:
            others = sum([num_tokens for view, num_tokens in started.items() if view.tenant != tenant])
            self._since[tenant] = self._totals.get(tenant, 0.0) - others

    def _count(self, planner: Planner) -> None:
        """Add what requests have had since the last step to what their tenants had."""
        planner.settle()
        for view in self._waiting:  # where everybody begins, also who starts and ends within a step
            self._had.setdefault(view, 0.0)
        for view, before in list(self._had.items()):
            service = self.scheduler.service(view) or 0.0
            assert service >= before, f"{view.request_id} has had {service:g}, and {before:g} a step before"
            self._totals[view.tenant] = self._totals.get(view.tenant, 0.0) + service - before
            if view.status is RequestStatus.FINISHED:
                del self._had[view]
            else:
                self._had[view] = service

    def _compare(self, tenants: set[str]) -> None:
        """Tenants who have requests left waiting, against each other, each pair from the first such step on."""
        begun, self._begun = self._begun, {}
        for one, other in permutations(sorted(tenants), 2):
            lead, most = self._totals[one] - self._totals[other], self._unforeseen(one)
            even = self._begun[one, other] = begun.get((one, other), lead + self._unforeseen(other))
            what = f"tenant {one!r} got {lead - even:g} ahead of {other!r}, which has been waiting as well"
            assert lead - even <= most + ROUNDING, f"{what}: {most:g} at most"

    def _unforeseen(self, tenant: str) -> float:
        """What `tenant` has had, or been let off, since it last started a request."""
        return self._totals[tenant] - self._since.get(tenant, self._totals[tenant])
