"""What every request of a walk must produce, and whether it did."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmkit.engine.limits import EngineLimits
from llmkit.engine.progress import StepOutput
from llmkit.interfaces.scheduler import DenialReason
from llmkit.testing.coverage import Coverage
from llmkit.testing.reference import continuation
from llmkit.types import FinishReason, Request

NEVER = 1 << 60


@dataclass(slots=True)
class _Expected:
    """The one right continuation of a request, and what has come of it so far."""

    request: Request
    tokens: list[int]
    reason: FinishReason
    got: list[int] = field(default_factory=list)
    is_aborted: bool = False


@dataclass(slots=True)
class Expectations:
    """The book of all requests of a walk. `faults` is the executor's; with `may_reject` any request may be rejected.

    Without it a scheduler may only refuse, as `DenialReason.TOO_LATE`, who has a deadline and never ran.
    """

    limits: EngineLimits
    faults: Mapping[str, int]
    may_reject: bool
    coverage: Coverage
    _queues: defaultdict[str, deque[_Expected]] = field(default_factory=lambda: defaultdict(deque))

    def add(self, request: Request) -> int:
        """`request` was accepted and has not run yet; how many tokens it will produce."""
        limits = self.limits
        tokens, reason = continuation(request, limits.vocab_size, limits.eos_token_ids, limits.max_model_len)
        self._queues[request.request_id].append(_Expected(request, tokens, reason))
        return len(tokens)

    def abort(self, request_id: str) -> None:
        """The caller has aborted a live request."""
        self._queues[request_id][-1].is_aborted = True

    def take(self, output: StepOutput) -> Request | None:
        """Compare what a step added; the request if this was its end. AssertionError at the first wrong token."""
        expected, name = self._queues[output.request_id][0], output.request_id
        expected.got += output.token_ids
        self.coverage.num_tokens += len(output.token_ids)
        wanted = expected.tokens[: len(expected.got)]
        assert expected.got == wanted, f"{name} got {expected.got}, wants {wanted}"
        if output.finish_reason is None:
            return None
        self._queues[output.request_id].popleft()
        assert output.completion is not None, f"{name} ended without its completion"
        assert list(output.completion.token_ids) == expected.got, f"{name}: the completion is not what was streamed"
        self._check_end(expected, output.finish_reason, output.error)
        self.coverage.num_preemptions += output.completion.metrics.num_preemptions
        self.coverage.num_cached_tokens += output.completion.metrics.num_cached_tokens
        self.coverage.num_aborts += output.finish_reason is FinishReason.ABORT
        self.coverage.num_errors += output.finish_reason is FinishReason.ERROR
        return expected.request

    def check_none_left(self) -> None:
        """Every request has ended."""
        missing = [expected.request.request_id for queue in self._queues.values() for expected in queue]
        assert not missing, f"requests {missing} never ended"

    def _check_end(self, expected: _Expected, reason: FinishReason, error: str | None) -> None:
        request, num_got = expected.request, len(expected.got)
        name, fault = request.request_id, self.faults.get(request.request_id, NEVER)
        num_before_fault = max(0, fault - request.num_prompt_tokens)
        if reason is FinishReason.ABORT:
            assert expected.is_aborted, f"{name} was aborted by nobody"
        elif reason is FinishReason.ERROR and error is not None and error.startswith("fault injected"):
            assert num_got == num_before_fault, f"{name} failed after {num_got} tokens, not {num_before_fault}"
        elif reason is FinishReason.ERROR and error is not None and error.startswith(DenialReason.TOO_LATE.value):
            assert request.deadline is not None, f"{name} has no deadline, but was refused: {error}"
            assert not request.num_service_tokens, f"{name} was refused, but it had run: {error}"
            self.coverage.num_late += 1
        elif reason is FinishReason.ERROR:
            assert self.may_reject, f"{name} was rejected, but fits: {error}"
        else:
            whole = expected.tokens, expected.reason
            assert (expected.got, reason) == whole, f"{name} ended as {expected.got, reason}, wants {whole}"
            assert num_got <= num_before_fault, f"{name} ended well, but its rows fail from length {fault} on"
