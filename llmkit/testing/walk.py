"""One walk: drive an engine through a world, check everything after every rule and compare every token.

A failure is an AssertionError that names the components, the seed, the step and the last plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from operator import attrgetter

from llmkit.engine.engine import Engine
from llmkit.engine.grouped_cache import groups_of
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.engine.progress import Progress
from llmkit.engine.swapping import HostPool, SwapCosts
from llmkit.errors import RequestError
from llmkit.interfaces.cache import CacheAllocator
from llmkit.interfaces.clock import VirtualClock
from llmkit.interfaces.scheduler import RequestQueue, RequestView, Scheduler, SchedulerSettings, SchedulingStep
from llmkit.testing.chaos import Chaos, ChaosError
from llmkit.testing.coverage import Coverage
from llmkit.testing.expected import Expectations
from llmkit.testing.fairness import Fairness
from llmkit.testing.grouped import GroupedOracle
from llmkit.testing.invariants import Books, check_empty, check_planner
from llmkit.testing.liveness import Liveness
from llmkit.testing.oracle import OracleExecutor
from llmkit.testing.tags import tags_of
from llmkit.testing.worlds import Event, Rule, World
from llmkit.types import Request, SamplingParams, StepPlan

_token_ids = attrgetter("token_ids")
STEP = Event(0, Rule.STEP)
SWAP_COSTS = SwapCosts(seconds_per_token=1.0, seconds_per_swap=2.5, seconds_per_block=0.1)
"""Under these only requests of three and more tokens are worth keeping in host memory."""


class _Preempting(Scheduler):
    """Takes one request out and grants nothing: pressure that no scheduler has chosen."""

    def __init__(self, settings: SchedulerSettings, victim: RequestView) -> None:
        super().__init__(settings)
        self._victim = victim

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        step.preempt(self._victim)


@dataclass(slots=True)
class Walk:
    """One world, one scheduler, one cache, one depth. `trace` is every rule that was applied, steps included."""

    world: World
    scheduler: Scheduler
    cache: CacheAllocator
    depth: int = 0
    is_strict: bool = True
    engine: Engine = field(init=False)
    executor: OracleExecutor = field(init=False)
    executors: tuple[OracleExecutor, ...] = field(init=False)
    clock: VirtualClock = field(default_factory=VirtualClock)
    coverage: Coverage = field(default_factory=lambda: Coverage(num_walks=1))
    trace: list[Event] = field(default_factory=list)
    is_broken: bool = False
    _expected: Expectations = field(init=False)
    _liveness: Liveness = field(init=False)
    _fairness: Fairness = field(init=False)
    _books: Books = field(default_factory=Books)
    _looks: bool = True
    _num_known: int | None = None

    def __post_init__(self) -> None:
        world, limits, settings = self.world, self._limits(), self.scheduler.settings
        seqs, reach, size, faults = settings.max_num_seqs, limits.max_model_len, limits.vocab_size, world.faults
        block_size, groups = world.spec.block_size, groups_of(self.cache)
        self.executors = tuple(
            [OracleExecutor(block_size, seqs, reach, size, faults, world.packs, one.spec.window) for one in groups]
        )
        self.executor = self.executors[0]
        num_host_blocks = world.num_host_blocks
        host = HostPool(num_host_blocks, block_size, SWAP_COSTS) if num_host_blocks else None
        planner = Planner(self.scheduler, self.cache, host)
        executor = GroupedOracle(self.executors) if len(groups) > 1 else self.executor
        self.engine = Engine(planner, executor, limits, self.clock, depth=self.depth)
        self._expected = Expectations(limits, world.faults, isinstance(self.scheduler, Chaos), self.coverage)
        self._liveness = Liveness(self.depth, self.is_strict)
        self._fairness = Fairness(self.scheduler)

    def _limits(self) -> EngineLimits:
        """The world's, as far as the cache can serve them."""
        limits, most = self.world.limits, self.cache.max_num_tokens
        return limits if most is None else replace(limits, max_model_len=min(most, limits.max_model_len))

    def run(self) -> Coverage:
        """Walk through the world to its end; AssertionError at the first thing that is wrong."""
        events, engine, clock = deque(self.world.events), self.engine, self.clock
        while events or engine.has_unfinished:
            if events:
                if not engine.has_unfinished:
                    clock.sleep_until(events[0].at)
                while events and events[0].at <= clock.now():
                    self.apply(events.popleft())
            if engine.has_unfinished:
                self.apply(STEP)
        self.finish()
        return self.coverage

    def apply(self, event: Event) -> None:
        """Apply one rule and check everything; AssertionError that tells how to repeat it."""
        self.trace.append(event)
        try:
            if event is STEP:
                self._step()
            else:
                self._apply(event)
        except Exception as error:
            raise self._broken(error) from error

    def finish(self) -> None:
        """Step until nothing is left, then check that nothing is left behind."""
        try:
            self._finish()
        except Exception as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> AssertionError:
        self.is_broken = True
        return AssertionError(self._describe(error))

    def _apply(self, event: Event) -> None:
        rule, self._num_known = event.rule, None
        if rule is Rule.STEP:
            self._step()
            return
        if rule is Rule.ADD:
            assert event.request is not None
            if self._add(_copy_of(event.request, event.request_id)):
                for number in range(event.number):
                    sample = _copy_of(event.request, f"{event.request_id}+{number}")
                    sample.seed += number + 1
                    self._add(sample, after=event.request_id)
        elif rule is Rule.FORK:
            self._fork(event.request_id, event.number)
        elif rule is Rule.ABORT:
            self._abort([event.request_id])
        elif rule is Rule.RESET:
            self._abort(list(self.engine.planner.requests))
        elif rule is Rule.PREEMPT:
            self._preempt(event.number)
        else:
            assert event.request is not None
            self._probe(event.request)
        self._check()

    def _finish(self) -> None:
        while self.engine.has_unfinished:
            self._step()
        self.coverage.num_rules += len(self.trace)
        self.coverage.num_saved_blocks += self.executor.num_saved_blocks
        self.coverage.num_restored_blocks += self.executor.num_restored_blocks
        self.coverage.num_copied_blocks += self.executor.num_copied_blocks
        check_empty(self.engine.planner)
        self._expected.check_none_left()
        for group in groups_of(self.cache):
            num_slots = group.spec.num_slots
            whole = Request("whole", [0] * num_slots, SamplingParams(max_tokens=1), max_num_tokens=num_slots)
            assert group.allocate(whole, num_slots), f"an idle pool has no room for {num_slots} tokens"
            group.free(whole)
            group.check()

    def _add(self, request: Request, after: str | None = None) -> bool:
        """Whether it was taken."""
        name, limits = request.request_id, self.engine.limits
        is_wrong = not 0 < request.num_prompt_tokens < limits.max_model_len or name in self.engine.planner.requests
        streams = bool(request.num_prompt_tokens % 2)  # some report every token, some only at their end
        try:
            self.engine.add(request, Progress(request, limits.eos_token_ids, streams=streams), after)
        except RequestError as error:
            assert is_wrong, f"{name} was refused: {error}"
            self.coverage.num_refusals += 1
            return False
        assert not is_wrong, (
            f"{name} was taken with {request.num_prompt_tokens} tokens, of {limits.max_model_len} at most"
        )
        self._liveness.take_on(request, self._expected.add(request))
        return True

    def _fork(self, request_id: str, seed: int) -> None:
        """One more sample of a live request's prompt, wherever that one stands."""
        other = self.engine.planner.requests.get(request_id)
        if other is not None:
            name, prompt = f"{request_id}~{seed}", other.token_ids[: other.num_prompt_tokens]
            wanted = other.sampling_params, self.clock.now(), other.priority, other.tenant, other.deadline
            self._add(Request(name, prompt, *wanted, other.length_hint, seed), after=request_id)

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if request_id in self.engine.planner.requests:
                self._expected.abort(request_id)
            self.engine.abort([request_id])

    def _preempt(self, number: int) -> None:
        """Take out one of the running requests, whatever the scheduler thinks of it."""
        planner = self.engine.planner
        if planner.num_running:
            victim = planner._running[number % planner.num_running]
            self._liveness.force(victim._request)
            planner.scheduler = _Preempting(self.scheduler.settings, victim)
            planner.plan(self.clock.now())
            planner.scheduler = self.scheduler

    def _probe(self, request: Request) -> None:
        """What the cache offers for a prompt really is in the blocks it would hand out."""
        num_cached = self.cache.match(request)
        assert 0 <= num_cached < request.num_tokens, f"match says {num_cached} of {request.num_tokens} are cached"
        if num_cached and self.cache.allocate(request, num_cached):
            for group, executor in zip(groups_of(self.cache), self.executors, strict=True):
                first = group.num_released_blocks(request)
                table, num_hidden = list(group.block_table(request)), first * group.spec.block_size
                found = executor.entries(table[first:], num_cached - num_hidden)
                wanted = tags_of(request.token_ids[:num_cached])[num_hidden:]
                assert found == wanted, f"cached blocks {table} hold something else"
            self.cache.free(request)

    def _step(self) -> None:
        executor, engine, planner = self.executor, self.engine, self.engine.planner
        num_launched = executor.num_steps
        num_known = self._num_known_tokens() if self._num_known is None else self._num_known
        candidates = self._liveness.candidates(planner) if self._looks else []
        self._fairness.before_step(planner)
        try:
            outputs = engine.step()
        except ChaosError:
            outputs = []
        self._num_known = self._num_known_tokens()
        has_progress = bool(outputs) or self._num_known > num_known
        for output in outputs:
            ended = self._expected.take(output)
            if ended is not None:
                self._liveness.check_end(ended)
        has_launched = executor.num_steps > num_launched
        plan = executor.history[-1] if has_launched else None
        if plan is not None:
            self._check_limits(plan)
        self._fairness.after_step(planner, plan, self.clock.now())
        self.coverage.num_steps += 1
        self._looks = self.coverage.num_steps % self.world.looks_every == 0
        self._check()
        self._liveness.check_step(planner, candidates, has_launched, has_progress)
        self.clock.advance(1.0)

    def _num_known_tokens(self) -> int:
        return sum(map(len, map(_token_ids, self.engine.planner.requests.values())))

    def _check(self) -> None:
        executor, planner = self.executor, self.engine.planner
        in_flight = executor.num_steps - executor.num_results
        assert in_flight <= self.depth, f"{in_flight} steps in flight at depth {self.depth}"
        plans = list(executor.history)[-in_flight:] if in_flight and self._looks else ()
        check_planner(planner, plans, self._looks, self._books, self.executors)

    def _check_limits(self, plan: StepPlan) -> None:
        settings = self.scheduler.settings
        assert plan.num_tokens <= settings.max_num_batched_tokens, f"a step of {plan.num_tokens} tokens"
        assert len(plan.scheduled) <= settings.max_num_seqs, f"a step of {len(plan.scheduled)} requests"

    def _describe(self, error: Exception) -> str:
        names = f"{type(self.scheduler).__name__} on {type(self.cache).__name__}, depth {self.depth}"
        where = f"{names}, seed {self.world.seed}, step {self.coverage.num_steps}"
        what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        plans = "\n".join(f"  step {plan.step_id}: {_show(plan)}" for plan in self.executor.history)
        return f"{where}: {what}\n  ({self.world})\n{plans or '  no step was launched'}"


def _copy_of(request: Request, name: str) -> Request:
    """`request` under that name, to run in this walk only: a world is walked several times."""
    return Request(
        name,
        list(request.token_ids),
        request.sampling_params,
        request.arrival_time,
        request.priority,
        request.tenant,
        request.deadline,
        request.length_hint,
        request.seed,
        request.max_num_tokens,
    )


def _show(plan: StepPlan) -> str:
    """`id@slot[from:to]`, with * where a token is sampled."""
    rows = (f"{r.request_id}@{r.slot}[{r.start}:{r.start + r.num_tokens}]{'*' * r.samples}" for r in plan.scheduled)
    return " ".join(rows)
