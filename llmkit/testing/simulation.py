"""Schedulers compared without a model: the real engine and cache over the fake executor, on a virtual clock.

    target = simulate(MyScheduler(MyScheduler.Settings(max_num_seqs=8)), a_cache, cost=lambda plan: 0.002)
    outcome = workload.run(target, RunContext(folder))

The tokens are made up, lengths and order are not: what comes out is the same on every machine, to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pluggy

from llmkit import hookspecs
from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.engine.swapping import HostPool
from llmkit.interfaces.cache import CacheAllocator
from llmkit.interfaces.clock import Clock, VirtualClock
from llmkit.interfaces.executor import Executor, PendingStep
from llmkit.interfaces.scheduler import Scheduler
from llmkit.testing.fake import FakeExecutor
from llmkit.types import Completion, Request, RequestOutput, SamplingParams, StepPlan, StepResult

UNLIMITED = 1 << 30
Cost = Callable[[StepPlan], float]
"""How long a step takes, seconds."""


@dataclass
class TimedExecutor:
    """The fake executor, each of whose steps takes `cost(plan)` seconds of a virtual clock."""

    inner: FakeExecutor
    clock: VirtualClock
    cost: Cost

    def launch(self, plan: StepPlan) -> PendingStep:
        """Run `plan`; time passes when its result is waited for."""
        return _Landing(self.inner.launch(plan).wait(), self.clock, self.cost(plan))


@dataclass
class _Landing:
    result: StepResult
    clock: VirtualClock
    seconds: float

    def wait(self) -> StepResult:
        self.clock.advance(self.seconds)
        return self.result


@dataclass
class SimulatedTarget:
    """Has what `llmkit.workload.protocol.Target` asks for, except a naive model. Text is encoded as its bytes."""

    engine: Engine
    plugin_manager: pluggy.PluginManager
    num_generated: int = field(default=0)

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, /) -> list[RequestOutput]:
        """Submit all prompts at once and step until they have ended."""
        requests = []
        for prompt in prompts:
            now = self.engine.clock.now()
            requests.append(Request(f"g{self.num_generated}", list(prompt), params, now))
            self.engine.add(requests[-1])
            self.num_generated += 1
        done: dict[str, Completion] = {}
        while self.engine.has_unfinished:
            done |= {out.request_id: out.completion for out in self.engine.step() if out.completion}
        return [RequestOutput(None, tuple(r.token_ids), (done[r.request_id],)) for r in requests]

    def encode(self, text: str, /) -> list[int]:
        """Bytes of `text` in UTF-8."""
        return list(text.encode())

    def naive_model(self) -> object:
        """There is none."""
        raise NotImplementedError


def simulate(
    scheduler: Scheduler,
    cache: CacheAllocator,
    cost: Cost,
    *,
    vocab_size: int = 4096,
    depth: int = 0,
    clock: Clock | None = None,
    host: HostPool | None = None,
) -> SimulatedTarget:
    """An engine whose steps take `cost(plan)` seconds of a virtual clock; nothing takes time on any other `clock`."""
    clock = clock or VirtualClock()
    manager = pluggy.PluginManager("llmkit")
    manager.add_hookspecs(hookspecs)
    fake = FakeExecutor(cache.spec.block_size, vocab_size, window=cache.spec.window)
    executor: Executor = TimedExecutor(fake, clock, cost) if isinstance(clock, VirtualClock) else fake
    limits = EngineLimits(vocab_size, cache.max_num_tokens or UNLIMITED)
    engine = Engine(Planner(scheduler, cache, host), executor, limits, clock, manager.hook, depth)
    return SimulatedTarget(engine, manager)
