"""Steps that fail as a whole leave rubbish in their blocks; whoever comes next with the same prompt must not get it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.interfaces.cache import CacheSpec
from llmkit.interfaces.clock import VirtualClock
from llmkit.testing import OracleExecutor, continuation
from llmkit.types import Completion, FinishReason, Request, SamplingParams, StepPlan, StepResult
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous

VOCAB, STEM = 50, [(7 * at + 3) % 50 for at in range(20)]


@dataclass
class Broken:
    """A step whose failure shows when its result is read."""

    pending: Any

    def wait(self) -> StepResult:
        self.pending.wait()
        raise RuntimeError("the device gave up")


@dataclass
class FailingExecutor(OracleExecutor):
    """The steps whose numbers are in `bad` fail; what their requests should write then and later is lost."""

    bad: Collection[int] = ()
    broken: set[str] = field(default_factory=set)

    def launch(self, plan: StepPlan) -> Any:
        is_bad = self.num_steps in self.bad
        if is_bad:
            self.broken.update(row.request_id for row in plan.scheduled)
        pending = super().launch(plan)
        return Broken(pending) if is_bad else pending

    def _errors(self, plan: StepPlan) -> dict[int, str]:
        return {at: "lost" for at, row in enumerate(plan.scheduled) if row.request_id in self.broken}


def run(depth: int, bad: Collection[int], num_requests: int = 12) -> tuple[dict[str, Completion], list[Request]]:
    """A request every other step, all with the same beginning."""
    planner = Planner(
        Continuous(Continuous.Settings(max_num_seqs=4, max_num_batched_tokens=12)),
        PagedCache(PagedCache.Settings(), CacheSpec(40, 4)),
    )
    engine = Engine(
        planner, FailingExecutor(4, 4, 160, VOCAB, bad=bad), EngineLimits(VOCAB, 160), VirtualClock(), depth=depth
    )
    requests = [
        Request(str(n), [*STEM, n], SamplingParams(max_tokens=6, ignore_eos=True), seed=n) for n in range(num_requests)
    ]
    completions: dict[str, Completion] = {}
    waiting = list(requests)
    while waiting or engine.has_unfinished:
        if waiting and len(engine.planner.requests) < 3:
            engine.add(waiting.pop(0))
        completions |= {output.request_id: output.completion for output in engine.step() if output.completion}
        planner.allocator.check()
    assert planner.allocator.stats().num_used_blocks == 0
    return completions, requests


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("bad", [[0], [1], [2], [0, 2, 4], [5], [3, 11], [1, 2, 3, 4, 5, 6]])
def test_a_failed_step_publishes_nothing(depth: int, bad: list[int]) -> None:
    completions, requests = run(depth, bad)
    failed = {name for name, completion in completions.items() if completion.finish_reason is FinishReason.ERROR}
    assert failed and len(failed) < len(requests)
    for request in requests:
        if request.request_id not in failed:
            fresh = Request(request.request_id, request.token_ids[:21], request.sampling_params, seed=request.seed)
            tokens, _ = continuation(fresh, VOCAB, frozenset(), 160)
            assert list(completions[request.request_id].token_ids) == tokens
    assert sum(completion.metrics.num_cached_tokens for completion in completions.values()) >= 20


@dataclass
class Copyless(FailingExecutor):
    """The step that is to copy blocks fails, at once or when its result is read, and so it copies nothing."""

    at_once: bool = False
    num_failed: int = 0

    def launch(self, plan: StepPlan) -> Any:
        if plan.copies is None or self.num_failed:
            return super().launch(plan)
        self.num_failed += 1
        if self.at_once:
            raise MemoryError("no room")
        self.bad = [self.num_steps]
        return super().launch(replace(plan, copies=None))

    def read(self, row: Any) -> Any:
        """What a failed step left out is missed only by those it failed."""
        return row.stay.tags[row.first : row.end] if row.stay.request_id in self.broken else super().read(row)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_forks_end_with_the_step_that_should_copy_their_blocks(depth: int, prefix: bool, at_once: bool) -> None:
    """Two prompts of three samples each; a late sample, forked from one that was not in that step, is not affected."""
    cache = PagedCache(PagedCache.Settings(prefix=prefix), CacheSpec(60, 4))
    planner = Planner(Continuous(Continuous.Settings(max_num_seqs=8, max_num_batched_tokens=12)), cache)
    executor = Copyless(4, 8, 160, VOCAB, at_once=at_once)
    engine = Engine(planner, executor, EngineLimits(VOCAB, 160), VirtualClock(), depth=depth)
    prompts = {"a": STEM[:10], "b": STEM[3:14]}
    for name, prompt in prompts.items():
        for index in range(3):
            params = SamplingParams(max_tokens=9, ignore_eos=True)
            engine.add(Request(f"{name}{index}", list(prompt), params, seed=index), after=f"{name}0" if index else None)
    completions: dict[str, Completion] = {}
    while engine.has_unfinished:
        completions |= {output.request_id: output.completion for output in engine.step() if output.completion}
        planner.allocator.check()
    failed = {name for name, completion in completions.items() if completion.finish_reason is FinishReason.ERROR}
    assert executor.num_failed == 1 and {"a1", "a2"} <= failed and not failed & {"b1", "b2"}
    for name in completions.keys() - failed:
        fresh = Request(name, list(prompts[name[0]]), SamplingParams(max_tokens=9, ignore_eos=True), seed=int(name[1]))
        assert list(completions[name].token_ids) == continuation(fresh, VOCAB, frozenset(), 160)[0]
    assert planner.allocator.stats().num_used_blocks == 0


@pytest.mark.parametrize("num_steps", range(1, 6))
@pytest.mark.parametrize("depth", [0, 1])
def test_the_first_sample_may_be_aborted_at_any_time(depth: int, num_steps: int) -> None:
    cache = PagedCache(PagedCache.Settings(prefix=False), CacheSpec(60, 4))
    planner = Planner(Continuous(Continuous.Settings(max_num_seqs=3, max_chunk_tokens=8)), cache)
    engine = Engine(planner, OracleExecutor(4, 3, 160, VOCAB), EngineLimits(VOCAB, 160), VirtualClock(), depth=depth)
    requests = [Request(str(n), STEM[:14], SamplingParams(max_tokens=9, ignore_eos=True), seed=n) for n in range(5)]
    wanted = [continuation(request, VOCAB, frozenset(), 160)[0] for request in requests]
    for request in requests:
        engine.add(request, after="0" if request.seed else None)
    for _ in range(num_steps):
        engine.step()
    engine.abort(["0"])
    while engine.has_unfinished:
        engine.step()
        planner.allocator.check()
    assert [request.output_token_ids for request in requests[1:]] == wanted[1:]
    assert planner.allocator.stats().num_used_blocks == 0


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_request_aborted_in_flight_publishes_only_what_has_landed(depth: int) -> None:
    planner = Planner(
        Continuous(Continuous.Settings(max_chunk_tokens=8)), PagedCache(PagedCache.Settings(), CacheSpec(40, 4))
    )
    engine = Engine(planner, OracleExecutor(4, 64, 160, VOCAB), EngineLimits(VOCAB, 160), VirtualClock(), depth=depth)
    for name in ("a", "b"):
        engine.add(Request(name, list(STEM) if name == "a" else [1, 2], SamplingParams(max_tokens=30, ignore_eos=True)))
    num_found = []
    for _ in range(2):
        engine.step()
        num_found.append(planner.allocator.match(Request("c", [*STEM, 0], SamplingParams())))
    engine.abort(["a"])
    for _ in range(4):
        engine.step()
    assert num_found == [[8, 16], [0, 8], [0, 0]][depth]
    assert planner.allocator.match(Request("c", [*STEM, 0], SamplingParams())) == num_found[-1]
