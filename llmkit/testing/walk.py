"""One walk: drive an engine through a world, check everything after every step and compare every token.

A failure is an AssertionError that names the components, the seed, the step and the last plans.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

from llmkit.engine.engine import Engine
from llmkit.engine.planner import Planner
from llmkit.engine.progress import Progress, StepOutput
from llmkit.interfaces.cache import CacheAllocator
from llmkit.interfaces.clock import VirtualClock
from llmkit.interfaces.scheduler import Scheduler
from llmkit.testing.chaos import Chaos, ChaosError
from llmkit.testing.invariants import check_empty, check_planner
from llmkit.testing.oracle import OracleExecutor
from llmkit.testing.reference import continuation
from llmkit.testing.worlds import World
from llmkit.types import FinishReason, Request, StepPlan


@dataclass(slots=True)
class Coverage:
    """What walks went through, to see that they were not vacuous."""

    num_walks: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_aborts: int = 0
    num_errors: int = 0

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(slots=True)
class _Expected:
    """What one request must produce, and what it has produced so far."""

    request: Request
    tokens: list[int]
    reason: FinishReason
    got: list[int] = field(default_factory=list)
    is_aborted: bool = False


@dataclass(slots=True)
class Walk:
    """One world, one scheduler, one cache, one depth.

    Steps without output are counted: once everything that lives could have been computed twice over, one token after
    the other, there must have been some. Without `is_strict` a scheduler may idle and take a hundred times longer.
    """

    world: World
    scheduler: Scheduler
    cache: CacheAllocator
    depth: int = 0
    is_strict: bool = True
    engine: Engine = field(init=False)
    executor: OracleExecutor = field(init=False)
    clock: VirtualClock = field(init=False)
    coverage: Coverage = field(init=False)
    _expected: defaultdict[str, deque[_Expected]] = field(init=False)
    _num_quiet_steps: int = 0

    def __post_init__(self) -> None:
        self.clock, self.coverage = VirtualClock(), Coverage(num_walks=1)
        planner, limits = Planner(self.scheduler, self.cache), self.world.limits
        self.executor = OracleExecutor(
            self.world.spec.block_size,
            self.scheduler.settings.max_num_seqs,
            limits.max_model_len,
            limits.vocab_size,
            self.world.faults,
            self.world.packs,
        )
        self.engine = Engine(planner, self.executor, limits, self.clock, depth=self.depth)
        self._expected = defaultdict(deque)

    def run(self) -> Coverage:
        """Walk to the end; AssertionError at the first thing that is wrong."""
        try:
            self._run()
        except Exception as error:
            raise AssertionError(self._describe(error)) from error
        return self.coverage

    def _run(self) -> None:
        events = deque(self.world.events)
        while events or self.engine.has_unfinished:
            if not self.engine.has_unfinished:
                self.clock.sleep_until(events[0].at)
            while events and events[0].at <= self.clock.now():
                event = events.popleft()
                self._add(event.request) if event.request else self._abort(event.request_id)
            self._step()
            self.clock.advance(1.0)
        check_empty(self.engine.planner)
        missing = [expected.request.request_id for expected in self._outstanding()]
        assert not missing, f"requests {missing} never ended"

    def _add(self, request: Request) -> None:
        request, limits = replace(request, token_ids=list(request.token_ids)), self.world.limits
        tokens, reason = continuation(request, limits.vocab_size, limits.eos_token_ids, limits.max_model_len)
        streams = bool(request.num_prompt_tokens % 2)  # some report every token, some only at their end
        self.engine.add(request, Progress(request, limits.eos_token_ids, streams=streams))
        self._expected[request.request_id].append(_Expected(request, tokens, reason))

    def _abort(self, request_id: str) -> None:
        if request_id in self.engine.planner.requests:
            self._expected[request_id][-1].is_aborted = True
        self.engine.abort([request_id])

    def _step(self) -> None:
        before = self.executor.num_steps, self.executor.num_results
        try:
            outputs = self.engine.step()
        except ChaosError:
            outputs = []
        for output in outputs:
            self._take(output)
        after = self.executor.num_steps, self.executor.num_results
        if after[0] > before[0]:
            self._check_limits(self.executor.history[-1])
        in_flight = after[0] - after[1]
        assert in_flight <= self.depth, f"{in_flight} steps in flight at depth {self.depth}"
        check_planner(self.engine.planner, list(self.executor.history)[len(self.executor.history) - in_flight :])
        self.coverage.num_steps += 1
        self._check_progress(has_acted=before != after or bool(outputs), has_output=bool(outputs))

    def _take(self, output: StepOutput) -> None:
        expected = self._expected[output.request_id][0]
        expected.got += output.token_ids
        wanted, name = expected.tokens[: len(expected.got)], output.request_id
        assert expected.got == wanted, f"{name} got {expected.got}, wants {wanted}"
        self.coverage.num_tokens += len(output.token_ids)
        if output.finish_reason is None:
            return
        self._expected[output.request_id].popleft()
        assert output.completion is not None, f"{name} ended without its completion"
        assert list(output.completion.token_ids) == expected.got, f"{name}: the completion is not what was streamed"
        self._check_end(expected, output.finish_reason, output.error)
        self.coverage.num_preemptions += output.completion.metrics.num_preemptions
        self.coverage.num_cached_tokens += output.completion.metrics.num_cached_tokens
        self.coverage.num_aborts += output.finish_reason is FinishReason.ABORT
        self.coverage.num_errors += output.finish_reason is FinishReason.ERROR

    def _check_end(self, expected: _Expected, reason: FinishReason, error: str | None) -> None:
        request, num_got = expected.request, len(expected.got)
        name, fault = request.request_id, self.world.faults.get(request.request_id, 1 << 60)
        num_before_fault = max(0, fault - request.num_prompt_tokens)
        if reason is FinishReason.ABORT:
            assert expected.is_aborted, f"{name} was aborted by nobody"
        elif reason is FinishReason.ERROR and error is not None and error.startswith("fault injected"):
            assert num_got == num_before_fault, f"{name} failed after {num_got} tokens, not {num_before_fault}"
        elif reason is FinishReason.ERROR:
            assert isinstance(self.scheduler, Chaos), f"{name} was rejected, but fits: {error}"
        else:
            whole = expected.tokens, expected.reason
            assert (expected.got, reason) == whole, f"{name} ended as {expected.got, reason}, wants {whole}"
            assert num_got <= num_before_fault, f"{name} ended well, but its rows fail from length {fault} on"

    def _check_limits(self, plan: StepPlan) -> None:
        settings = self.scheduler.settings
        assert plan.num_tokens <= settings.max_num_batched_tokens, f"a step of {plan.num_tokens} tokens"
        assert len(plan.scheduled) <= settings.max_num_seqs, f"a step of {len(plan.scheduled)} requests"

    def _check_progress(self, has_acted: bool, has_output: bool) -> None:
        live = self.engine.planner.requests.values()
        may_idle = not live or not self.is_strict
        assert has_acted or may_idle, f"nothing ran and nothing was in flight, but {len(live)} could"
        self._num_quiet_steps = 0 if has_output else self._num_quiet_steps + 1
        bound = (2 if self.is_strict else 200) * (sum(request.num_tokens for request in live) + 2 * self.depth + 2)
        assert self._num_quiet_steps <= bound, f"{self._num_quiet_steps} steps without a token, {len(live)} live"

    def _outstanding(self) -> Iterator[_Expected]:
        for queue in self._expected.values():
            yield from queue

    def _describe(self, error: Exception) -> str:
        names = f"{type(self.scheduler).__name__} on {type(self.cache).__name__}, depth {self.depth}"
        where = f"{names}, seed {self.world.seed}, step {self.coverage.num_steps}"
        what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        plans = "\n".join(f"  step {plan.step_id}: {_show(plan)}" for plan in self.executor.history)
        return f"{where}: {what}\n  ({self.world})\n{plans or '  no step was launched'}"


def _show(plan: StepPlan) -> str:
    """`id@slot[from:to]`, with * where a token is sampled."""
    rows = (f"{r.request_id}@{r.slot}[{r.start}:{r.start + r.num_tokens}]{'*' * r.samples}" for r in plan.scheduled)
    return " ".join(rows)
