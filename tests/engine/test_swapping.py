"""Preempted requests in host memory: who is kept, what is copied when, and what is lost with a step that failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from llmkit import LLM, CapacityError, ConfigError
from llmkit.engine.device_timer import DeviceTimer
from llmkit.engine.engine import Engine
from llmkit.engine.executor import TorchExecutor
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.engine.swap_costs import measure_costs
from llmkit.engine.swapping import HostPool, SwapCosts
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.summary import summarise
from llmkit.report.summary_table import overview
from llmkit.testing import OracleExecutor, check_scheduler, continuation
from llmkit.testing.schedulers import build_cache
from llmkit.testing.simulation import simulate
from llmkit.types import BlockCopies, FinishReason, Request, SamplingParams, StepPlan
from llmkit.workload.driver import run_workload
from llmkit.workload.requests import TimedRequest
from llmkit_attention.sdpa import SdpaAttention
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous
from tests.tiny_llm import check_nothing_left, tiny

ALWAYS, NEVER = SwapCosts(1.0, 0.0, 0.0), SwapCosts(0.0, 1.0, 1.0)


def preempt_all(queue: Any, step: Any) -> None:
    for view in list(queue.running):
        step.preempt(view)


def preempted(make_rig: Any, host: HostPool, **options: Any) -> tuple[Any, Request]:
    """A request of 10 tokens, computed, preempted and waiting; the first three blocks of the pool were its own."""
    rig = make_rig(host=host, **options)
    request = rig.add("a", num_prompt=10)
    rig.planned(), rig.land()
    assert rig.allocator.block_table(request) == [0, 1, 2] and rig.plan(preempt_all) is None
    return rig, request


def test_it_comes_back_with_all_it_had_computed(make_rig: Any) -> None:
    rig, request = preempted(make_rig, HostPool(5, 4, ALWAYS))
    rig.add("b", num_prompt=4)
    plan = rig.planned()
    blocks = rig.allocator.block_table(request)
    assert plan.copies == BlockCopies(((0, 0), (1, 1), (2, 2)), tuple(enumerate(blocks)))
    assert [(row.start, row.num_tokens) for row in plan.scheduled] == [(10, 1), (0, 4)]
    assert request.num_recomputed_tokens == 0 and rig.land() == ["a", "b"]
    assert rig.planned().copies is None


def test_blocks_are_saved_before_others_write_there(make_rig: Any) -> None:
    rig, request = preempted(make_rig, HostPool(5, 4, ALWAYS))
    other = rig.add("b", num_prompt=32)
    plan = rig.planned(lambda queue, step: step.run(queue.waiting[1], 1 << 30))
    assert plan.copies == BlockCopies(((0, 0), (1, 1), (2, 2)), ()), "they are in the first step after it was preempted"
    rig.planner.finish(other, FinishReason.ABORT), rig.land()
    assert rig.planned().copies.restores == tuple(enumerate(rig.allocator.block_table(request)))


def test_no_step_repeats_while_blocks_wait_to_be_saved(make_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(host=HostPool(5, 4, ALWAYS))
    rig.add("a"), rig.add("b")
    for _ in range(2):
        rig.planned(), rig.land()
    rig.plan(lambda queue, step: step.preempt(queue.running[0]))
    monkeypatch.setattr(rig.scheduler, "repeats", lambda num_waiting, num_free_seqs: True)
    plan = rig.planned(lambda queue, step: step.run(queue.running[0], 1))
    assert plan.copies.saves == ((0, 0), (2, 1)) and len(plan.scheduled) == 1


def test_what_the_cache_still_has_is_not_copied_back(make_rig: Any) -> None:
    rig, request = preempted(make_rig, HostPool(5, 4, ALWAYS), prefix=True)
    plan = rig.planned()
    assert plan.copies.restores == ((2, rig.allocator.block_table(request)[2]),) and plan.scheduled[0].start == 10


@pytest.mark.parametrize("host", [HostPool(2, 4, ALWAYS), HostPool(5, 4, NEVER), None], ids=["full", "dear", "none"])
def test_without_room_or_where_it_does_not_pay_it_is_computed_again(make_rig: Any, host: HostPool) -> None:
    rig, request = preempted(make_rig, host)
    plan = rig.planned()
    assert plan.copies is None and plan.scheduled[0].start == 0 and request.num_recomputed_tokens == 10


def test_the_decision_weighs_what_was_measured() -> None:
    costs = SwapCosts(seconds_per_token=1.0, seconds_per_swap=10.0, seconds_per_block=2.0)
    assert not costs.favours_swap(num_tokens=16, num_blocks=4) and costs.favours_swap(num_tokens=20, num_blocks=4)
    assert not costs.favours_swap(num_tokens=20, num_blocks=5)


def test_memory_comes_back_from_who_ends_while_waiting(make_rig: Any) -> None:
    host = HostPool(3, 4, ALWAYS)
    rig, request = preempted(make_rig, host)
    rig.planner.finish(request, FinishReason.ABORT)
    rig.add("b", num_prompt=12)
    assert rig.planned().copies is None, "nobody needs what was to be saved"
    rig.land(), rig.plan(preempt_all)
    assert rig.planned().copies is not None


def test_a_request_preempted_in_the_step_that_brings_it_back_keeps_what_it_has(make_rig: Any) -> None:
    rig, request = preempted(make_rig, HostPool(3, 4, ALWAYS))

    def start_and_preempt(queue: Any, step: Any) -> None:
        step.run(queue.waiting[0], 10)
        step.preempt(queue.waiting[0])

    assert rig.plan(start_and_preempt) is None and request.num_preemptions == 2
    assert rig.planned().scheduled[0].start == 10


def test_a_scheduler_that_raises_loses_nothing(make_rig: Any) -> None:
    rig, _ = preempted(make_rig, HostPool(3, 4, ALWAYS))

    def start_and_raise(queue: Any, step: Any) -> None:
        step.run(queue.waiting[0], 10)
        raise KeyError("trouble")

    with pytest.raises(KeyError):
        rig.plan(start_and_raise)
    plan = rig.planned()
    assert plan.scheduled[0].start == 10 and len(plan.copies.saves) == len(plan.copies.restores) == 3


def test_an_allocator_that_raises_costs_only_the_copy(make_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(host=HostPool(3, 4, ALWAYS))
    request = rig.add("a", num_prompt=10)
    rig.planned(), rig.land()

    def preempt_with_trouble(queue: Any, step: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(rig.allocator, "block_table", {}.__getitem__)
            step.preempt(queue.running[0])

    rig.plan(preempt_with_trouble)
    assert rig.planned().scheduled[0].start == 0 and request.num_recomputed_tokens == 10


@dataclass
class Failing(OracleExecutor):
    """Fails in the first step that has something to copy."""

    has_failed: bool = False

    def launch(self, plan: StepPlan) -> Any:
        if plan.copies is not None and not self.has_failed:
            self.has_failed = True
            raise MemoryError("no room on the host")
        return super().launch(plan)


@pytest.mark.parametrize("depth", [0, 1])
def test_what_a_failed_step_was_to_save_is_computed_again(depth: int) -> None:
    """Two grow beyond the pool; the later one gives way, and the step that should save its blocks fails."""
    planner = Planner(
        Continuous(Continuous.Settings(max_num_seqs=2)),
        PagedCache(PagedCache.Settings(prefix=False), CacheSpec(8, 4)),
        HostPool(8, 4, ALWAYS),
    )
    executor = Failing(4, 2, 32, 50)
    engine = Engine(planner, executor, EngineLimits(50, 32), depth=depth)
    requests = [Request(str(n), [n] * 9, SamplingParams(max_tokens=20, ignore_eos=True)) for n in range(2)]
    wanted, _ = continuation(requests[1], 50, frozenset(), 32)
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        engine.step()
    assert executor.has_failed and requests[0].finish_reason is FinishReason.ERROR
    assert requests[1].output_token_ids == wanted and requests[1].num_recomputed_tokens > 9
    assert not executor.num_restored_blocks


@pytest.mark.parametrize("cache", [PagedCache, ContiguousCache])
def test_walks_go_through_host_memory(cache: type[CacheAllocator]) -> None:
    coverage = check_scheduler(Continuous, caches=[cache], depths=[0, 1], seeds=range(30))
    assert coverage.num_saved_blocks > coverage.num_restored_blocks - 1 > 30, coverage


def test_copies_are_counted() -> None:
    recorders = []
    for host in (None, HostPool(20, 4, ALWAYS)):
        scheduler = Continuous(Continuous.Settings(max_num_seqs=8, max_num_batched_tokens=64))
        cache = build_cache(PagedCache, CacheSpec(10, 4), {"prefix": False})
        target = simulate(scheduler, cache, lambda plan: 0.01, vocab_size=300, host=host)
        recorders.append(MetricsRecorder())
        requests = [TimedRequest(0.0, tuple(range(i, i + 6)), 20) for i in range(4)]
        run_workload(target, requests, SamplingParams(ignore_eos=True), recorders[-1])
    plain, swapped = map(summarise, recorders)
    assert plain["recompute_tax"] > 0 and swapped["recompute_tax"] == 0
    assert swapped["num_saved_blocks"] == swapped["num_restored_blocks"] > swapped["num_preemptions"] > 0
    assert dict(overview(swapped))["swapped"] == "{0} blocks out, {0} back".format(swapped["num_saved_blocks"])
    assert not plain["num_saved_blocks"] and "swapped" not in dict(overview(plain))


def test_costs_are_measured_when_the_engine_is_built() -> None:
    llm = LLM(tiny(), block_size=4, num_blocks=16, swap_gib=0.001)
    host = llm.engine.planner.host
    assert host is not None and host.num_blocks == 2**30 // 1000 // llm.attention.bytes_per_block()
    assert host.costs.seconds_per_token > 0 and host.costs.seconds_per_swap + host.costs.seconds_per_block > 0
    prompts, params = [[number + 3] * 12 for number in range(4)], SamplingParams(max_tokens=40, ignore_eos=True)
    plain = LLM(tiny(), block_size=4, num_blocks=80)
    outputs = llm.generate(prompts, params)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert [output.token_ids for output in outputs] == [out.token_ids for out in plain.generate(prompts, params)]
    check_nothing_left(llm)


def test_measuring_leaves_no_trace_in_the_time_of_steps() -> None:
    executor = LLM(tiny(), block_size=4, num_blocks=16, swap_gib=0.001).engine.executor
    assert isinstance(executor, TorchExecutor)
    executor.timer = DeviceTimer([].pop)
    measure_costs(executor, num_tokens=8, num_blocks=1)
    assert not executor.timer._running and not executor.timer._spare


def test_what_cannot_be_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CapacityError, match=r"engine\.swap_gib=1e-09: one block takes .* MiB"):
        LLM(tiny(), block_size=4, num_blocks=16, swap_gib=1e-9)
    with pytest.raises(CapacityError, match=r"engine\.swap_gib=4096\.0: .* GiB of host memory are free"):
        LLM(tiny(), block_size=4, num_blocks=16, swap_gib=4096)
    monkeypatch.setattr(SdpaAttention, "allocate_host", lambda self, num_blocks: False)
    with pytest.raises(ConfigError, match=r"engine\.swap_gib=1\.0: attention SdpaAttention copies nothing to the host"):
        LLM(tiny(), block_size=4, num_blocks=16, swap_gib=1.0)
