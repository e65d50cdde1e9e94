"""Steps an engine whose scheduler may hold requests back, but not for ever. Torch-free."""

from __future__ import annotations

from llmkit.engine.engine import Engine
from llmkit.engine.progress import StepOutput
from llmkit.errors import LlmkitError

POLL = 0.001  # seconds after which a scheduler that runs nothing is asked again
PATIENCE = 10.0  # seconds for which it is


class PatientSteps:
    """`step` is the engine's, with a pause after one in which nothing happened."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._idle_since: float | None = None
        self._num_idle = 0

    def step(self, others_come: bool = False) -> list[StepOutput]:
        """LlmkitError if the scheduler has run nothing for PATIENCE seconds, unless `others_come`: then it may wait."""
        engine, planner = self._engine, self._engine.planner
        num_planned = planner.num_planned_steps
        outputs = engine.step()
        if outputs or planner.num_planned_steps > num_planned or not engine.has_unfinished:
            self._idle_since, self._num_idle = None, 0
        else:
            self._wait(others_come)
        return outputs

    def _wait(self, others_come: bool) -> None:
        """Nothing was planned and nothing ended: the last steps are landing, or requests are held back."""
        clock = self._engine.clock
        now = clock.now()
        self._num_idle += 1
        if self._num_idle <= self._engine.depth + 1:
            return
        self._idle_since = now if self._idle_since is None else self._idle_since
        if now - self._idle_since > PATIENCE and not others_come:
            planner = self._engine.planner
            name, num_waiting = type(planner.scheduler).__name__, len(planner.requests)
            self._idle_since, self._num_idle = None, 0
            raise LlmkitError(f"scheduler {name} has run nothing for {PATIENCE:g} s; waiting: {num_waiting}")
        clock.sleep_until(now + POLL)
