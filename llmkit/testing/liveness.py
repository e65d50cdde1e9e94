"""Things keep moving: a workload ends in time proportional to its work, and nobody is preempted for ever."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkit.engine.planner import Planner
from llmkit.interfaces.scheduler import RequestView
from llmkit.types import Request, RequestStatus


@dataclass(slots=True)
class Liveness:
    """Counts work and steps. Without `is_strict` a scheduler may idle and take a hundred times longer.

    Work is counted in tokens: what a request's prompt and output come to, and once more for each time the walk itself
    preempted it. One token after the other, computed twice over, is the slowest a scheduler may be.
    """

    depth: int
    is_strict: bool
    num_steps: int = 0
    num_quiet_steps: int = 0
    work: int = 0
    forced: dict[Request, int] = field(default_factory=dict)

    def take_on(self, request: Request, num_output_tokens: int) -> None:
        """A request was added that will produce that many tokens."""
        self.work += request.num_prompt_tokens + num_output_tokens + self.depth + 1

    def force(self, request: Request) -> None:
        """The walk itself preempted `request`: that is no fault of the scheduler."""
        self.forced[request] = self.forced.get(request, 0) + 1
        self.work += request.num_tokens + self.depth + 1
        self.num_quiet_steps = 0

    def candidates(self, planner: Planner) -> list[RequestView]:
        """Before a step: if one of them could run, the step must run something. Empty while blocks are awaited."""
        if not self.is_strict or planner._residency.num_reclaiming_blocks:
            return []
        running = planner._running
        if not running:
            return planner._waiting[:1]
        return list(running) if any(_has_work(view._request, planner) for view in running) else []

    def check_step(
        self, planner: Planner, candidates: list[RequestView], has_launched: bool, has_progress: bool
    ) -> None:
        """After a step; AssertionError if nothing ran that could have, or nothing comes any more.

        With steps in flight a victim's blocks come back later, so a step that has preempted may launch nothing.
        """
        if candidates and not has_launched and any(view.status is not RequestStatus.FINISHED for view in candidates):
            has_preempted = self.depth and any(view.status is RequestStatus.PREEMPTED for view in candidates)
            assert has_preempted, f"nothing ran, but one of {candidates} could"
        self.num_steps += 1
        self.num_quiet_steps = 0 if has_progress or not planner.requests else self.num_quiet_steps + 1
        slack = 1 if self.is_strict else 100
        if self.num_quiet_steps > 4:
            quiet = 2 * sum([len(request.token_ids) for request in planner.requests.values()]) + 4 * self.depth + 4
            assert self.num_quiet_steps <= slack * quiet, f"{self.num_quiet_steps} steps without a token"
        most = 2 * slack * self.work + self.depth + 1
        assert self.num_steps <= most, f"{self.num_steps} steps for {self.work} tokens of work"

    def check_end(self, request: Request) -> None:
        """When a request ends: the scheduler preempted it at most once in four tokens of the whole walk's work."""
        num_preemptions = request.num_preemptions - self.forced.pop(request, 0)
        most = (4 + self.work // 4) * (1 if self.is_strict else 100)
        name = request.request_id
        assert num_preemptions <= most, f"{name} was preempted {num_preemptions} times in {self.work} tokens of work"


def _has_work(request: Request, planner: Planner) -> bool:
    """Whether a running request has a token to run, and is not waiting for its own window to move on."""
    known, start = (
        request.num_tokens + request.num_pending_samples,
        request.num_computed_tokens + request.num_in_flight_tokens,
    )
    fits = not request.num_in_flight_tokens or planner._residency.num_fitting_tokens(request, start) > 0
    return start < known < request.max_num_tokens and fits
