"""The seam between planning and computing: plain plans in, tokens out later."""

from __future__ import annotations

from typing import Protocol

from llmkit.types import StepPlan, StepResult


class PendingStep(Protocol):
    """A launched step."""

    def wait(self) -> StepResult:
        """Block until the step has run; the result has one entry per scheduled row."""
        ...


class Executor(Protocol):
    """Runs steps in the order they are launched.

    Inputs of a row are read from state the executor keeps per slot: the tokens handed over by its last `Admission`
    and those it sampled itself since. So step n+1 may be launched before step n's tokens are known to the host.
    """

    def launch(self, plan: StepPlan) -> PendingStep: ...
