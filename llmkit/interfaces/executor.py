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

    Room for speculative decoding: a sampling row may run past the last known token, over blocks reserved ahead. What
    stands there is for the executor to propose and to verify in the same step. The result then has one token more than
    were accepted: the first in `token_ids`, the others in `more_token_ids`. KV behind the last but one of them is not
    valid: who planned the row commits up to there and truncates the rest, and launches the sequence's next row only
    after that. The engine plans no such rows.
    """

    def launch(self, plan: StepPlan) -> PendingStep: ...
