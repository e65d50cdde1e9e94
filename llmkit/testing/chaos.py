"""The worst scheduler there is: it does everything wrong that the contract lets it say. Memory and tokens must survive.

It is seeded, runs requests in random sizes (negative and huge ones too), twice, after they have ended, preempts what
waits, rejects what has ended, keeps using steps that are over, and sometimes raises half way.
"""

from __future__ import annotations

from random import Random
from typing import ClassVar

from pydantic import Field

from llmkit.errors import PluginError
from llmkit.interfaces.scheduler import RequestQueue, RequestView, Scheduler, SchedulerSettings, SchedulingStep
from llmkit.types import RequestStatus


class ChaosError(RuntimeError):
    """What `Chaos` raises on purpose."""


class ChaosSettings(SchedulerSettings):
    """How bad it is."""

    seed: int = 0
    raises: float = Field(0.05, ge=0.0, le=1.0, description="chance that a call of `schedule` ends in a ChaosError")
    rejects: float = Field(0.001, ge=0.0, le=1.0, description="chance that an action rejects a waiting request")


class Chaos(Scheduler):
    """Random actions on current, past and foreign objects."""

    Settings: ClassVar[type[SchedulerSettings]] = ChaosSettings

    def __init__(self, settings: SchedulerSettings) -> None:
        super().__init__(settings)
        assert isinstance(settings, ChaosSettings)
        self._raises, self._rejects = settings.raises, settings.rejects
        self._random = Random(settings.seed)
        self._past_views: list[RequestView] = []
        self._past_step: SchedulingStep | None = None

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        """Use and abuse `step`."""
        views = [*queue.running, *queue.waiting]
        self._random.shuffle(views)
        self._abuse_past_step(views)
        for _ in range(self._random.randint(0, 3 * len(views))):
            self._act(self._random.choice(views), step)
            if self._past_views:
                self._act(self._random.choice(self._past_views), step)
            if self._random.random() < self._raises / len(views):
                self._past_step = step
                raise ChaosError("on purpose")
        self._past_views = (self._past_views + views)[-50:]
        self._past_step = step

    def _act(self, view: RequestView, step: SchedulingStep) -> None:
        die = self._random.random()
        if die < self._rejects:
            if view.status is not RequestStatus.RUNNING:
                step.reject(view, "chaos")
        elif die < 0.06:
            step.preempt(view)
        else:
            step.run(view, self._random.choice((-3, 0, 1, 1, 2, 5, view.num_runnable_tokens, 1 << 40)))

    def _abuse_past_step(self, views: list[RequestView]) -> None:
        step = self._past_step
        if step is None or not views:
            return
        view = views[0]
        for action in (lambda: step.run(view, 1), lambda: step.preempt(view), lambda: step.reject(view, "")):
            try:
                action()
            except PluginError:
                continue
            raise AssertionError("a step that is over can still be acted on")
