"""A target without a model: the simulated engine with the built-in scheduler and cache, in a small pool."""

from __future__ import annotations

from collections.abc import Callable

from llmkit.interfaces.cache import CacheSpec
from llmkit.interfaces.clock import Clock
from llmkit.interfaces.scheduler import Scheduler
from llmkit.testing.simulation import SimulatedTarget, simulate
from llmkit.types import StepPlan
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous

BLOCK_SIZE = 4
FakeTarget = SimulatedTarget


def fake_target(
    clock: Clock | None = None,
    cost: Callable[[StepPlan], float] = lambda plan: 0.01,
    num_blocks: int = 64,
    vocab_size: int = 300,
    depth: int = 0,
    scheduler: Scheduler | None = None,
) -> FakeTarget:
    """An engine of `num_blocks` blocks of 4 tokens; `cost` counts on a virtual clock only."""
    scheduler = scheduler or Continuous(Continuous.Settings(max_num_seqs=8, max_num_batched_tokens=64))
    cache = PagedCache(PagedCache.Settings(), CacheSpec(num_blocks, BLOCK_SIZE))
    return simulate(scheduler, cache, cost, vocab_size=vocab_size, depth=depth, clock=clock)
