"""A target without a model: the real engine, scheduler and cache over the fake executor, on a clock of choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pluggy

from llmkit import hookspecs
from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.interfaces.cache import CacheSpec
from llmkit.interfaces.clock import Clock, VirtualClock
from llmkit.interfaces.executor import PendingStep
from llmkit.interfaces.scheduler import Scheduler
from llmkit.interfaces.settings import Settings
from llmkit.testing.fake import FakeExecutor
from llmkit.types import Request, RequestOutput, SamplingParams, StepPlan, StepResult
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous

BLOCK_SIZE = 4


@dataclass
class TimedExecutor:
    """The fake executor, each of whose steps takes `cost(plan)` seconds of a virtual clock."""

    inner: FakeExecutor
    clock: VirtualClock
    cost: Callable[[StepPlan], float]

    def launch(self, plan: StepPlan) -> PendingStep:
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
class FakeTarget:
    """Has what `llmkit.workload.protocol.Target` asks for, except a naive model."""

    engine: Engine
    plugin_manager: pluggy.PluginManager
    num_generated: int = field(default=0)

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, /) -> list[RequestOutput]:
        requests = []
        for prompt in prompts:
            now = self.engine.clock.now()
            requests.append(Request(f"g{self.num_generated}", list(prompt), params, now))
            self.engine.add(requests[-1])
            self.num_generated += 1
        done = {}
        while self.engine.has_unfinished:
            done |= {out.request_id: out.completion for out in self.engine.step() if out.completion}
        return [RequestOutput(None, tuple(r.token_ids), (done[r.request_id],)) for r in requests]

    def encode(self, text: str, /) -> list[int]:
        return list(text.encode())

    def naive_model(self) -> object:
        raise NotImplementedError


def fake_target(
    clock: Clock | None = None,
    cost: Callable[[StepPlan], float] = lambda plan: 0.01,
    num_blocks: int = 64,
    vocab_size: int = 300,
    depth: int = 0,
    scheduler: Scheduler | None = None,
) -> FakeTarget:
    """An engine of `num_blocks` blocks of 4 tokens; `cost` counts on a virtual clock only."""
    clock = clock or VirtualClock()
    manager = pluggy.PluginManager("llmkit")
    manager.add_hookspecs(hookspecs)
    scheduler = scheduler or Continuous(Continuous.Settings(max_num_seqs=8, max_num_batched_tokens=64))
    planner = Planner(scheduler, PagedCache(Settings(), CacheSpec(num_blocks, BLOCK_SIZE)))
    fake = FakeExecutor(BLOCK_SIZE, vocab_size)
    executor = TimedExecutor(fake, clock, cost) if isinstance(clock, VirtualClock) else fake
    limits = EngineLimits(vocab_size, num_blocks * BLOCK_SIZE)
    return FakeTarget(Engine(planner, executor, limits, clock, manager.hook, depth), manager)
