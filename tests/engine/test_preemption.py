"""What a preemption costs: a request gives up its last blocks first, and computes again only what others have taken."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.clock import VirtualClock
from llmkit.interfaces.scheduler import Scheduler
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.summary import summarise
from llmkit.testing import FakeExecutor
from llmkit.testing.schedulers import build_cache
from llmkit.testing.simulation import simulate
from llmkit.types import FinishReason, Request, SamplingParams, StepPlan
from llmkit.workload.driver import run_workload
from llmkit.workload.requests import TimedRequest
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.eviction import POLICIES
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache
from llmkit_schedulers.continuous import Continuous
from llmkit_schedulers.fair import Fair
from llmkit_schedulers.prefix_aware import PrefixAware
from llmkit_schedulers.priority import Priority
from llmkit_schedulers.sjf import ShortestJobFirst
from llmkit_schedulers.static import Static

BLOCK_SIZE, VOCAB_SIZE = 4, 300
SCHEDULERS = [Continuous, Fair, PrefixAware, Priority, ShortestJobFirst, Static]


def preempt_all(queue: Any, step: Any) -> None:
    for view in list(queue.running):
        step.preempt(view)


def first_row(plan: StepPlan) -> tuple[int, int]:
    return plan.scheduled[0].start, plan.scheduled[0].num_tokens


@pytest.mark.parametrize("cache", [PagedCache, RadixCache])
@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("num_taken", range(5))
def test_only_what_others_have_taken_is_computed_again(
    make_rig: Any, num_taken: int, eviction: str, cache: type[CacheAllocator]
) -> None:
    """A pool of 8 blocks, 4 of which are full of what the victim has computed; it holds half of a fifth."""
    rig = make_rig(cache=build_cache(cache, CacheSpec(8, BLOCK_SIZE), {"eviction": eviction}))
    victim = rig.add("a", num_prompt=18)
    rig.planned(), rig.land()
    assert rig.plan(preempt_all) is None and rig.allocator.stats().num_cached_blocks == 4
    other = Request("b", [99] * BLOCK_SIZE * (4 + num_taken), SamplingParams(max_tokens=1))
    rig.planner.add(other)
    rig.planned(lambda queue, step: step.run(queue.waiting[1], 1 << 30))
    rig.planner.finish(other, FinishReason.ABORT), rig.land()  # what it has computed is not worth keeping
    num_kept = BLOCK_SIZE * (4 - num_taken)
    assert first_row(rig.planned()) == (num_kept, 19 - num_kept)
    assert victim.num_recomputed_tokens == 18 - num_kept


def test_what_was_in_flight_is_lost_with_the_block_that_is_not_full(make_rig: Any) -> None:
    rig = make_rig(prefix=True)
    victim = rig.add("a", num_prompt=18)
    rig.planned(), rig.land(), rig.planned()
    assert rig.plan(preempt_all) is None and rig.land() == [None]
    assert first_row(rig.planned()) == (16, 3) and victim.num_recomputed_tokens == 19 - 16


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("cache", [PagedCache, RadixCache, ContiguousCache])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_pool_one_block_larger_than_the_longest_request_is_enough(
    scheduler: type[Scheduler], cache: type[CacheAllocator], depth: int
) -> None:
    longest = 9 * BLOCK_SIZE
    settings = scheduler.Settings(max_num_seqs=4, max_num_batched_tokens=16)
    allocator = build_cache(cache, CacheSpec(10, BLOCK_SIZE), {})
    executor = FakeExecutor(BLOCK_SIZE, VOCAB_SIZE)
    limits = EngineLimits(VOCAB_SIZE, 10 * BLOCK_SIZE)
    engine = Engine(Planner(scheduler(settings), allocator), executor, limits, VirtualClock(), depth=depth)
    for number, num_prompt in enumerate((4, 13, 24, 5, 35)):
        params = SamplingParams(max_tokens=longest - num_prompt, ignore_eos=True)
        engine.add(Request(str(number), [number] * num_prompt, params, priority=-number))
    ended = {}
    for _ in range(5 * 3 * longest):
        ended |= {output.request_id: output.finish_reason for output in engine.step() if output.finish_reason}
    assert ended == dict.fromkeys(map(str, range(5)), FinishReason.LENGTH)
    assert not allocator.stats().num_used_blocks


def recompute_tax(cache: CacheAllocator) -> tuple[int, float]:
    """Preemptions and tax of four requests that grow to 7 blocks each in a pool of 10; the tax as reported."""
    scheduler = Continuous(Continuous.Settings(max_num_seqs=8, max_num_batched_tokens=64))
    target = simulate(scheduler, cache, lambda plan: 0.01, vocab_size=VOCAB_SIZE)
    requests = [TimedRequest(0.0, tuple(range(i, i + 6)), 20) for i in range(4)]
    recorder = MetricsRecorder()
    played = run_workload(target, requests, SamplingParams(ignore_eos=True), recorder)
    result = summarise(recorder)
    num_computed = sum(step.num_tokens for step in recorder.steps)
    num_needed = 4 * (6 + 20 - 1)
    assert result["recompute_tax"] == pytest.approx((num_computed - num_needed) / num_computed)
    num_recomputed = sum(one.metrics.num_recomputed_tokens for one in played.completions.values())
    assert num_recomputed == num_computed - num_needed, "the engine counts what the recorder has seen"
    return result["num_preemptions"], result["recompute_tax"]


@pytest.mark.parametrize("cache", [PagedCache, RadixCache])
def test_the_tax_is_what_was_computed_again_and_not_what_was_still_there(cache: type[CacheAllocator]) -> None:
    spec = CacheSpec(10, BLOCK_SIZE)
    num_plain, plain = recompute_tax(build_cache(PagedCache, spec, {"prefix": False}))
    num_kept, kept = recompute_tax(build_cache(cache, spec, {}))
    assert num_plain == num_kept > 0, "what is cached counts as room, so it changes no choice"
    assert 0 < kept < 0.65 * plain
