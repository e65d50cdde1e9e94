"""What a user of the kit sees: repeatable walks, good messages, its own reference components in order."""

import re
from itertools import pairwise
from typing import Any

import pytest

from llmkit.batching import ContinuousBatching
from llmkit.interfaces.cache import CacheSpec
from llmkit.interfaces.scheduler import RequestQueue, Scheduler, SchedulingStep
from llmkit.testing import (
    Chaos,
    Coverage,
    FakeExecutor,
    ReferenceCache,
    ReservingCache,
    check_cache,
    check_scheduler,
    continuation,
    next_token,
)
from llmkit.testing.schedulers import build_scheduler
from llmkit.testing.worlds import draw_world
from llmkit.types import Admission, BlockTableEdit, Request, SamplingParams, ScheduledRequest, StepPlan
from llmkit_schedulers.sequential import Sequential


class Lazy(Scheduler):
    """Runs the first request and forgets the others."""

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        if queue.waiting and not queue.running and step.now < 3:
            step.run(queue.waiting[0], 5)


class Broken(Scheduler):
    """Has a bug."""

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        raise KeyError("missing")


class Unfair(ContinuousBatching):
    """Rejects what it does not like."""

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        if len(queue.waiting) > 1:
            step.reject(queue.waiting[-1], "too much to do")
        super().schedule(queue, step)


@pytest.mark.parametrize("cache", [ReferenceCache, ReservingCache])
def test_the_reference_caches_conform(cache: Any) -> None:
    assert check_cache(cache, seeds=range(4)).num_steps > 500


def test_walks_repeat() -> None:
    first, second = (check_scheduler(ContinuousBatching, seeds=range(5)) for _ in range(2))
    assert first == second and first.num_walks == 5 * 2 * 3
    assert str(draw_world(3)) == str(draw_world(3)) != str(draw_world(4))


def test_a_failure_names_everything_needed_to_repeat_it() -> None:
    with pytest.raises(AssertionError) as caught:
        check_scheduler(Lazy)
    first, world, *plans = str(caught.value).splitlines()
    found = re.fullmatch(r"Lazy on ReferenceCache, depth (\d), seed (\d+), step (\d+): nothing ran, .*", first)
    assert found, first
    assert re.search(r"\d+ blocks of \d, max_num_seqs=\d, .* events", world) and plans[0].strip().startswith("step 0: ")
    with pytest.raises(AssertionError, match=re.escape(first)):
        check_scheduler(Lazy, depths=[int(found[1])], seeds=[int(found[2])])


def test_an_exception_in_a_plugin_is_told_with_its_seed() -> None:
    with pytest.raises(AssertionError, match=r"Broken on .*, seed 0, step 0: KeyError: 'missing'") as caught:
        check_scheduler(Broken)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("seeds", [[], range(0)])
def test_a_check_of_nothing_is_no_success(seeds: Any) -> None:
    with pytest.raises(AssertionError, match=r"^nothing was checked: seeds, caches and depths must not be empty"):
        check_scheduler(ContinuousBatching, seeds=seeds)
    with pytest.raises(AssertionError, match=r"^nothing was checked: seeds, schedulers and depths must not be empty"):
        check_cache(ReferenceCache, seeds=seeds)


def test_what_cannot_be_checked_is_told_in_one_line() -> None:
    wrong: Any = "continuous"
    with pytest.raises(AssertionError, match=r"^'continuous' is no subclass of Scheduler"):
        check_scheduler(wrong)
    wrong = ContinuousBatching
    with pytest.raises(AssertionError, match=r"ContinuousBatching'> is no subclass of CacheAllocator"):
        check_cache(wrong)
    with pytest.raises(AssertionError, match=r"^max_seqs: no such option; did you mean 'max_num_seqs'"):
        check_scheduler(ContinuousBatching, options={"max_seqs": 3}, seeds=range(1))
    wrong = type("Mine", (ContinuousBatching,), {"Settings": dict})
    with pytest.raises(AssertionError, match=r"^Mine\.Settings must subclass Scheduler\.Settings$"):
        check_scheduler(wrong)


def test_rejecting_what_fits_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="was rejected, but fits: too much to do"):
        check_scheduler(Unfair)


def test_limits_a_scheduler_does_not_allow_are_not_asked_of_it() -> None:
    drawn = {"max_num_seqs": 5, "max_num_batched_tokens": 7, "max_chunk_tokens": 3, "unknown": 1}
    settings = build_scheduler(Sequential, drawn, {"max_chunk_tokens": 2}).settings
    assert settings.model_dump() == {"max_num_seqs": 1, "max_num_batched_tokens": 7, "max_chunk_tokens": 2}


def test_coverage_adds_up() -> None:
    assert Coverage(1, 2, 3) + Coverage(num_tokens=4, num_errors=1) == Coverage(1, 2, 7, num_errors=1)


def test_chaos_is_chaotic_but_seeded() -> None:
    coverage = check_scheduler(Chaos, seeds=range(2), is_strict=False)
    assert coverage == check_scheduler(Chaos, seeds=range(2), is_strict=False)
    assert coverage.num_preemptions > coverage.num_walks


def test_tokens_depend_on_every_token_before_them_and_on_the_seed() -> None:
    prefixes = [[1, 2, 3], [2, 1, 3], [1, 2, 4], [0, 1, 2, 3], [1, 2], [1, 2, 3, 0]]
    assert len({next_token(0, prefix, 1 << 30) for prefix in prefixes}) == len(prefixes)
    assert next_token(0, [1], 1 << 30) != next_token(1, [1], 1 << 30)
    assert {next_token(0, [n], 5) for n in range(100)} == set(range(5))


def test_the_continuation_heeds_stops_and_lengths() -> None:
    def run(**params: Any) -> tuple[list[int], str]:
        return continuation(Request("a", [1, 2], SamplingParams(**params)), 50, frozenset({7}), 60)

    tokens, reason = run(max_tokens=40, ignore_eos=True)
    assert (len(tokens), reason) == (40, "length")
    assert len(run(max_tokens=100, ignore_eos=True)[0]) == 58
    assert run(max_tokens=40, ignore_eos=True, stop_token_ids=(tokens[5],)) == (
        tokens[: tokens.index(tokens[5]) + 1],
        "stop",
    )


def plan(*rows: ScheduledRequest, blocks: tuple[int, ...] = (3,), slot: int = 0, start: int = 0) -> StepPlan:
    admission = Admission(0, "a", (5, 6, 7), 3, SamplingParams(), 0)
    return StepPlan(0, rows, (admission,), (BlockTableEdit(slot, start, blocks),))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (plan(ScheduledRequest("a", 0, 0, 4, True, 1)), "runs to 4, but knows 3 tokens"),
        (plan(ScheduledRequest("a", 0, 0, 3, True, 1), blocks=()), "its blocks reach 0"),
        (plan(ScheduledRequest("a", 0, 1, 2, True, 1)), "reads a wrong KV entry at position 0, block 3"),
        (plan(ScheduledRequest("a", 0, 0, 2, True, 1)), "samples=True after 2 of 3 tokens"),
        (plan(ScheduledRequest("a", 0, 0, 3, False, 1)), "samples=False after 3 of 3 tokens"),
        (plan(ScheduledRequest("b", 0, 0, 3, True, 1)), "slot 0 is not the slot of 'b'"),
        (plan(ScheduledRequest("a", 0, 0, 0, False, 1)), "a row of 0 tokens"),
        (plan(*[ScheduledRequest("a", 0, 0, 3, True, 1)] * 2), "slot 0 has two rows"),
        (plan(ScheduledRequest("a", 0, 0, 3, True, 1), start=1), "an edit starts at 1"),
    ],
)
def test_the_fake_executor_refuses_plans_a_device_would_get_wrong(wrong: StepPlan, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        FakeExecutor(4).launch(wrong)


def test_the_fake_executor_notices_what_is_overwritten_in_flight() -> None:
    executor = FakeExecutor(4)
    first = executor.launch(plan(ScheduledRequest("a", 0, 0, 3, True, 1)))
    other = Admission(1, "b", (8, 9), 2, SamplingParams(), 0)
    executor.launch(StepPlan(1, (ScheduledRequest("b", 1, 0, 2, True, 2),), (other,), (BlockTableEdit(1, 0, (3,)),)))
    with pytest.raises(AssertionError, match="'a' reads a wrong KV entry at position 0, block 3"):
        first.wait()


def test_the_reference_cache_scatters_its_blocks() -> None:
    cache, request = ReferenceCache(ReferenceCache.Settings(), CacheSpec(24, 1)), Request("a", [1], SamplingParams())
    assert cache.allocate(request, 12)
    table = list(cache.block_table(request))
    assert all(after != before + 1 for before, after in pairwise(table))
