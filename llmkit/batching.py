"""Continuous batching: the mechanism every continuous scheduler shares.

Requests join the running batch as soon as there is room and leave it as soon as they end; long prompts run in chunks
beside the others' decodes; when blocks run out a victim is preempted and recomputed later. A plugin overrides only
its choice: `order_waiting`, `order_running`, `admit`, `chunk`, `victim` or `outranks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from pydantic import Field

from llmkit.errors import PluginError
from llmkit.interfaces.scheduler import (
    DenialReason,
    Denied,
    Grant,
    RequestQueue,
    RequestView,
    Scheduler,
    SchedulerSettings,
    SchedulingStep,
)

UNLIMITED = 1 << 30
CROWDED = DenialReason.NO_SEQS, DenialReason.NO_BLOCKS
"""What makes room for a request when another is preempted."""


class ContinuousBatchingSettings(SchedulerSettings):
    """Options of a continuous scheduler."""

    max_chunk_tokens: int = Field(0, ge=0, description="most tokens of one request in a step; 0 means no limit")


class ContinuousBatching(Scheduler):
    """First come, first served, unless a subclass chooses otherwise."""

    Settings: ClassVar[type[SchedulerSettings]] = ContinuousBatchingSettings

    def __init__(self, settings: SchedulerSettings) -> None:
        super().__init__(settings)
        self._max_chunk = getattr(settings, "max_chunk_tokens", 0) or UNLIMITED
        self._preempted: set[RequestView] = set()
        self._num_beside = 0
        self._runs_all = self._has_default("schedule", "order_running", "chunk", "_continue")
        self._admits_in_order = self._has_default("schedule", "order_waiting", "admit", "outranks", "_admit")
        self._can_displace = not self._has_default("outranks", "_displace")

    # The choices -----------------------------------------------------------------------------------------------

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterable[RequestView]:
        """Who is admitted first. Default: preempted ones, then by arrival."""
        return waiting

    def order_running(self, running: Sequence[RequestView], now: float) -> Sequence[RequestView]:
        """Who runs first; the last is the default victim. Default: by admission."""
        return running

    def admit(self, request: RequestView, step: SchedulingStep) -> bool:
        """Whether a waiting request may start now; False passes it over. Default: whenever it fits."""
        return True

    def chunk(self, request: RequestView, step: SchedulingStep) -> int:
        """Most tokens of `request` in this step. Default: `max_chunk_tokens`."""
        return self._max_chunk

    def victim(self, candidates: Sequence[RequestView], step: SchedulingStep) -> RequestView:
        """Who gives up its blocks; `candidates` are in running order. Default: the last.

        Judge by something that running does not change, ties included, or two requests can preempt each other for
        ever. `llmkit.testing.check_scheduler` finds that.
        """
        return candidates[-1]

    def outranks(self, waiting: RequestView, running: RequestView) -> bool:
        """Whether `waiting` may displace `running` when there is no room for both. Default: never."""
        return False

    def may_pass(self, started: RequestView, waiting: RequestView, now: float) -> bool:
        """Nobody passes who came first or has run before, unless a subclass chooses who is admitted."""
        return not self._admits_in_order or self.came_first(started, waiting)

    @staticmethod
    def came_first(one: RequestView, other: RequestView) -> bool:
        """Whether `one` is not behind `other` in the queue: who was preempted is in front, then who came first."""
        return one.num_preemptions > 0 or (not other.num_preemptions and one.arrival_time <= other.arrival_time)

    # The mechanism ---------------------------------------------------------------------------------------------

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        """Continue the running requests, then admit waiting ones while there is room."""
        self._preempted.clear()
        self._num_beside = len(queue.running)
        running = self.order_running(queue.running, step.now)
        if self._continue(running, step) and queue.waiting:
            self._admit(queue.waiting, running, step)

    def repeats(self, num_waiting: int, num_free_seqs: int) -> bool:
        """Yes while nobody could join, unless a subclass makes choices of its own that could tell otherwise."""
        return self._runs_all and (not num_waiting or (self._admits_in_order and not num_free_seqs))

    def _has_default(self, *methods: str) -> bool:
        """Whether no subclass overrides any of `methods`."""
        return all(getattr(type(self), name) is getattr(ContinuousBatching, name) for name in methods)

    def _continue(self, running: Sequence[RequestView], step: SchedulingStep) -> bool:
        """Run what is running; False if blocks were short, so that nobody may join."""
        run, chunk, preempted = step.run, self.chunk, self._preempted
        has_room = True
        for request in running:
            if preempted and request in preempted:
                continue
            outcome = run(request, chunk(request, step))
            if outcome.__class__ is Grant:
                continue
            if outcome.reason is DenialReason.NO_TOKENS:  # type: ignore[union-attr]
                break
            if outcome.reason is DenialReason.NO_BLOCKS:  # type: ignore[union-attr]
                has_room = False
                self._make_room(request, running, step)
        return has_room

    def _make_room(self, request: RequestView, running: Sequence[RequestView], step: SchedulingStep) -> None:
        """Preempt until `request` fits or is itself the victim; wait instead while blocks are on their way back."""
        while not step.num_reclaiming_blocks:
            victim = self._choose_victim([r for r in running if r not in self._preempted], step)
            self._preempt(victim, step)
            if victim is request or isinstance(step.run(request, self.chunk(request, step)), Grant):
                return

    def _admit(self, waiting: Sequence[RequestView], running: Sequence[RequestView], step: SchedulingStep) -> None:
        for request in self.order_waiting(waiting, step.now):
            if not self.admit(request, step):
                continue
            outcome = self._start(request, step)
            if self._can_displace and isinstance(outcome, Denied) and outcome.reason in CROWDED:
                outcome = self._displace(request, running, step, outcome)
            if isinstance(outcome, Grant):
                continue
            if outcome.reason is DenialReason.NEVER_FITS:
                step.reject(request, outcome.reason.value)
            else:
                break

    def _displace(
        self, request: RequestView, running: Sequence[RequestView], step: SchedulingStep, denied: Denied
    ) -> Grant | Denied:
        """Preempt running requests that `request` outranks, lowest first, until it fits."""
        outcome: Grant | Denied = denied
        candidates = [r for r in running if r not in self._preempted]
        while isinstance(outcome, Denied) and candidates and not step.num_reclaiming_blocks:
            victim = self._choose_victim(candidates, step)
            if not self.outranks(request, victim):
                break
            candidates.remove(victim)
            self._preempt(victim, step)
            outcome = self._start(request, step)
        return outcome

    def _start(self, request: RequestView, step: SchedulingStep) -> Grant | Denied:
        """Admit what can finish its prompt beside the others; what starts sooner is preempted and computed again."""
        if not step.num_free_seqs:
            return Denied(DenialReason.NO_SEQS)  # without a look at the cache
        if self._num_beside and step.num_missing_blocks(request) > step.num_free_blocks:
            return Denied(DenialReason.NO_BLOCKS)
        outcome = step.run(request, self.chunk(request, step))
        self._num_beside += isinstance(outcome, Grant)
        return outcome

    def _choose_victim(self, candidates: Sequence[RequestView], step: SchedulingStep) -> RequestView:
        victim = self.victim(candidates, step)
        if victim not in candidates:
            raise PluginError(f"{type(self).__name__}.victim chose {victim!r}, which is not among the candidates")
        return victim

    def _preempt(self, victim: RequestView, step: SchedulingStep) -> None:
        self._preempted.add(victim)
        self._num_beside -= 1
        step.preempt(victim)
