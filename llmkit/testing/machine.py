"""The walks as hypothesis state machines: slower, but they shrink what they find.

`cache_machine` is an allocator alone, `walk_machine` a whole engine under the rules of `llmkit.testing.walk`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from llmkit.engine.limits import EngineLimits
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.scheduler import Scheduler
from llmkit.testing.ledger import Ledger
from llmkit.testing.schedulers import build_cache, build_scheduler
from llmkit.testing.walk import STEP, Walk
from llmkit.testing.worlds import Event, Rule, World
from llmkit.types import Request, SamplingParams

REQUESTS = st.integers(0, 3)
LENGTHS = st.integers(0, 40)
PROMPTS = st.lists(st.integers(0, 1), max_size=24)
WINDOWS = st.none() | st.integers(1, 40)
SPECS = st.builds(CacheSpec, st.integers(4, 24), st.integers(1, 8), WINDOWS)
SMALL_SPECS = st.builds(CacheSpec, st.integers(1, 12), st.integers(1, 4), WINDOWS)
LIMITS = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.integers(1, 30),
        "max_chunk_tokens": st.integers(0, 4),
    }
)


def cache_machine(cache: type[CacheAllocator], options: Mapping[str, Any] | None = None) -> type[RuleBasedStateMachine]:
    """A state machine for `cache`; assign its `TestCase` to a module variable and pytest runs it."""

    class CacheMachine(RuleBasedStateMachine):
        """Four requests share a small pool in every order of operations; two begin alike, the last is a stranger."""

        @initialize(spec=SMALL_SPECS, lengths=st.lists(LENGTHS, min_size=4))
        def make(self, spec: CacheSpec, lengths: list[int]) -> None:
            self.ledger = Ledger(build_cache(cache, spec, options or {}))
            self.requests = [_request(number, 1 + lengths[number] % spec.num_slots) for number in range(4)]

        @rule(number=REQUESTS, more=st.integers(1, 9))
        def allocate(self, number: int, more: int) -> None:
            request = self.requests[number]
            reach = len(self.ledger.table(request)) * self.ledger.block_size
            num_cached = 0 if reach else self.ledger.match(request)
            self.ledger.allocate(request, min(max(reach, num_cached) + more, request.max_num_tokens))

        @rule(number=REQUESTS, other=REQUESTS, more=st.integers(1, 9))
        def fork(self, number: int, other: int, more: int) -> None:
            self.ledger.fork(self.requests[number], self.requests[other], more)

        @rule(number=REQUESTS, upto=LENGTHS)
        def truncate(self, number: int, upto: int) -> None:
            self.ledger.truncate(self.requests[number], upto)

        @rule(number=REQUESTS)
        def commit(self, number: int) -> None:
            request = self.requests[number]
            reach = len(self.ledger.table(request)) * self.ledger.block_size
            self.ledger.commit(request, min(reach, request.num_tokens))

        @rule(number=REQUESTS)
        def free(self, number: int) -> None:
            self.ledger.free(self.requests[number])

    return CacheMachine


def _request(number: int, num_tokens: int) -> Request:
    """Even ones begin alike, odd ones too; the last belongs to another tenant."""
    params = SamplingParams(max_tokens=1)
    return Request(str(number), [number % 2] * num_tokens, params, tenant=str(number // 3), max_num_tokens=num_tokens)


class WalkMachine(RuleBasedStateMachine):
    """Requests over an alphabet of two tokens share a small pool; `walk_machine` says of which parts."""

    scheduler: ClassVar[type[Scheduler]]
    cache: ClassVar[type[CacheAllocator]]
    depth: ClassVar[int]
    options: ClassVar[Mapping[str, Any]]
    cache_options: ClassVar[Mapping[str, Any]]
    walk: Walk
    num_requests = 0

    def begin(self, world: World) -> None:
        """Start in `world`; its events are left to the rules."""
        built = build_scheduler(self.scheduler, world.scheduler_options, self.options)
        self.walk = Walk(world, built, build_cache(self.cache, world.spec, self.cache_options), self.depth)

    def apply(self, rule: Rule, request_id: str = "", request: Request | None = None, number: int = 0) -> None:
        """One rule, then every check; as a `STEP` as many steps as `number` says."""
        if rule is not Rule.STEP:
            self.walk.apply(Event(0, rule, request_id, request, number))
            return
        for _ in range(number):
            self.walk.apply(STEP)

    @initialize(spec=SPECS, limits=LIMITS, packs=st.booleans(), looks_every=st.integers(1, 4), host=st.integers(0, 9))
    def make(self, spec: CacheSpec, limits: dict[str, int], packs: bool, looks_every: int, host: int) -> None:
        reach = EngineLimits(2, spec.num_slots if spec.window is None else 3 * spec.num_slots, frozenset({1}))
        world = World(-1, spec, limits, [], reach, packs=packs, looks_every=looks_every, num_host_blocks=host)
        self.begin(world)

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 12),
        ignore_eos=st.booleans(),
        priority=st.integers(0, 2),
        num_more=st.integers(0, 2),
        tenant=st.sampled_from(("", "a")),
    )
    def add(
        self, prompt: list[int], max_tokens: int, ignore_eos: bool, priority: int, num_more: int, tenant: str
    ) -> None:
        name, now = str(self.num_requests), self.walk.clock.now()
        self.num_requests += 1
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
        self.apply(Rule.ADD, name, Request(name, prompt, params, now, priority, tenant), num_more)

    @rule(number=st.integers(0, 9), seed=st.integers(1, 4))
    def fork(self, number: int, seed: int) -> None:
        self.apply(Rule.FORK, str(number), number=seed)

    @precondition(lambda self: self.walk.engine.has_unfinished)
    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        self.apply(Rule.STEP, number=num_steps)

    @rule(number=st.integers(0, 9))
    def abort(self, number: int) -> None:
        self.apply(Rule.ABORT, str(number))

    @precondition(lambda self: self.walk.engine.planner.num_running)
    @rule(number=st.integers(0, 4))
    def preempt(self, number: int) -> None:
        self.apply(Rule.PREEMPT, number=number)

    @rule()
    def reset(self) -> None:
        self.apply(Rule.RESET)

    @rule(prompt=PROMPTS)
    def probe(self, prompt: list[int]) -> None:
        self.apply(Rule.PROBE, request=Request("probe", prompt or [0], SamplingParams(max_tokens=1)))

    def teardown(self) -> None:
        """Run to the end, where nothing may be left."""
        if hasattr(self, "walk") and not self.walk.is_broken:
            self.walk.finish()


def walk_machine(
    scheduler: type[Scheduler],
    cache: type[CacheAllocator],
    depth: int = 0,
    options: Mapping[str, Any] | None = None,
    cache_options: Mapping[str, Any] | None = None,
) -> type[WalkMachine]:
    """A state machine for an engine of these parts; `options` are the scheduler's. Its `TestCase` is for pytest."""
    parts = {
        "scheduler": scheduler,
        "cache": cache,
        "depth": depth,
        "options": options or {},
        "cache_options": cache_options or {},
    }
    return type(f"{scheduler.__name__}{cache.__name__}Machine", (WalkMachine,), parts)


def replay(machine: type[WalkMachine], walk: Walk) -> None:
    """Take the rules of a walk that has failed through a machine of the same parts: it fails there alike."""
    state = machine()
    state.begin(walk.world)
    for event in walk.trace:
        state.walk.apply(event)
    state.teardown()
