"""Samples of one prompt are forked from one that has computed it: what they share, copy and run."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.errors import RequestError
from llmkit.interfaces.cache import CacheAllocator, CacheSpec, CacheStats
from llmkit.testing.schedulers import build_cache
from llmkit.types import BlockCopies, FinishReason, Request, SamplingParams, StepPlan
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache


def rows(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(row.request_id, row.start, row.num_tokens, row.samples) for row in plan.scheduled]


def add_fork(rig: Any, name: str, num_prompt: int = 10, after: str = "a", **fields: Any) -> Request:
    params = fields.pop("params", SamplingParams(max_tokens=8))
    request = Request(name, list(range(num_prompt)), params, **fields)
    rig.planner.add(request, after)
    return request


def preempt(*names: str) -> Any:
    def script(queue: Any, step: Any) -> None:
        for view in [view for view in queue.running if view.request_id in names]:
            step.preempt(view)

    return script


def only(*names: str) -> Any:
    def script(queue: Any, step: Any) -> None:
        for view in [*queue.running, *queue.waiting]:
            if view.request_id in names:
                step.run(view, 1 << 30)

    return script


@pytest.mark.parametrize("cache", [PagedCache, RadixCache])
@pytest.mark.parametrize("prefix", [True, False])
def test_samples_wait_for_the_first_and_run_one_token(make_rig: Any, prefix: bool, cache: type[CacheAllocator]) -> None:
    rig = make_rig(cache=build_cache(cache, CacheSpec(8, 4), {"prefix": prefix} if cache is PagedCache else {}))
    first = rig.add("a", num_prompt=10)
    forks = [add_fork(rig, name) for name in "bc"]
    assert rows(rig.planned()) == [("a", 0, 10, True)] and rig.planner.num_waiting == 2
    assert rig.planned() and rig.planner.num_running == 1, "what they wait for is still in flight"
    rig.land()
    plan = rig.planned()
    assert rows(plan)[1:] == [("b", 9, 1, True), ("c", 9, 1, True)]
    parent, (one, two) = rig.allocator.block_table(first), map(rig.allocator.block_table, forks)
    assert one[:2] == two[:2] == parent[:2] and len({parent[2], one[2], two[2]}) == 3
    assert plan.copies == BlockCopies(forks=((parent[2], one[2], 1), (parent[2], two[2], 1)))
    assert [fork.num_cached_tokens for fork in forks] == [9, 9] and rig.allocator.stats() == CacheStats(5, 0, 3)
    assert rig.planned().copies is None


@pytest.mark.parametrize(
    ("num_prompt", "num_shared", "num_copied"), [(5, 1, 0), (6, 1, 1), (8, 1, 3), (9, 2, 0), (12, 2, 3)]
)
def test_the_last_known_token_runs_and_what_it_writes_into_is_its_own(
    make_rig: Any, num_prompt: int, num_shared: int, num_copied: int
) -> None:
    rig = make_rig(prefix=False)
    first = rig.add("a", num_prompt)
    rig.planned(), rig.land()
    fork = add_fork(rig, "b", num_prompt)
    plan = rig.planned()
    assert rows(plan)[1] == ("b", num_prompt - 1, 1, True)
    parent, table = rig.allocator.block_table(first), rig.allocator.block_table(fork)
    assert table[:num_shared] == parent[:num_shared] and not {*table[num_shared:]} & {*parent}
    copies = plan.copies.forks if plan.copies else ()
    assert copies == (((parent[num_shared], table[num_shared], num_copied),) if num_copied else ())


@pytest.mark.parametrize(("num_prompt", "waits"), [(4, False), (5, True)])
def test_samples_wait_only_for_a_block_but_take_less_if_it_is_there(
    make_rig: Any, num_prompt: int, waits: bool
) -> None:
    rig = make_rig(prefix=True)
    rig.add("a", num_prompt=num_prompt)
    add_fork(rig, "b", num_prompt)
    assert len(rows(rig.planned())) == (1 if waits else 2)
    rig.land()
    add_fork(rig, "c", num_prompt)
    assert rows(rig.planned())[-1] == ("c", num_prompt - 1, 1, True)


def test_samples_do_not_wait_where_nothing_is_shared(make_rig: Any) -> None:
    for cache in (ContiguousCache, PagedCache):
        rig = make_rig(cache=build_cache(cache, CacheSpec(16, 4), {"prefix": False} if cache is PagedCache else {}))
        if cache is PagedCache:
            rig.planner._forks.is_on = False
        rig.add("a", num_prompt=10)
        add_fork(rig, "b")
        plan = rig.planned()
        assert [row[1:] for row in rows(plan)] == [(0, 10, True)] * 2 and plan.copies is None
        rig.land()
        add_fork(rig, "c")
        assert rows(rig.planned())[-1] == ("c", 0, 10, True)


def test_one_that_wants_log_probabilities_of_its_prompt_runs_whole(make_rig: Any) -> None:
    rig = make_rig(prefix=True, num_blocks=16)
    rig.add("a", num_prompt=10)
    add_fork(rig, "b", params=SamplingParams(prompt_logprobs=1))
    assert rows(rig.planned())[1] == ("b", 0, 10, True)
    rig.land()
    add_fork(rig, "c", params=SamplingParams(prompt_logprobs=1))
    assert rows(rig.planned())[-1] == ("c", 0, 10, True)


def test_samples_go_on_when_the_first_ends_without_having_run(make_rig: Any) -> None:
    rig = make_rig(prefix=True)
    rig.planner.add(Request("a", list(range(10)), SamplingParams()))
    add_fork(rig, "b"), add_fork(rig, "c")
    rig.planner.finish(rig.planner.requests["b"], FinishReason.ABORT)
    rig.planner.finish(rig.planner.requests["a"], FinishReason.ABORT)
    assert rows(rig.planned()) == [("c", 0, 10, True)]
    assert not rig.planner._held and len(rig.planner._forks._families) == 1


def test_any_sample_that_has_landed_is_a_parent(make_rig: Any) -> None:
    """The first has ended; the second runs, but its copy has only been launched."""
    rig = make_rig(prefix=False)
    first = rig.add("a", num_prompt=10)
    second = add_fork(rig, "b")
    rig.planned(), rig.land(), rig.planned()
    rig.planner.finish(first, FinishReason.STOP)
    third = add_fork(rig, "c", after="b")
    assert rig.planner._residency.find(third).parent is None
    rig.land()
    assert rows(rig.planned(only("c"))) == [("c", 9, 1, True)]
    assert rig.allocator.block_table(third)[:2] == rig.allocator.block_table(second)[:2]
    assert rig.in_flight[-1].copies.forks[0].source == rig.allocator.block_table(second)[2]


def test_one_that_was_preempted_is_no_parent_until_it_has_landed_again(make_rig: Any) -> None:
    rig = make_rig(prefix=False, num_blocks=16)
    first = rig.add("a", num_prompt=10)
    rig.planned(), rig.land(), rig.plan(preempt("a"))
    second = add_fork(rig, "b")
    found = []
    for script in (only("a"), lambda queue, step: None):
        found.append(rig.planner._residency.find(second).parent)
        rig.plan(script)
    rig.land()
    assert found == [None, None] and rig.planner._residency.find(second).parent is first


def test_a_sample_that_was_preempted_is_forked_again(make_rig: Any) -> None:
    """Its own tokens run again, the prompt does not."""
    rig = make_rig(prefix=False)
    rig.add("a", num_prompt=10)
    second = add_fork(rig, "b")
    for _ in range(3):
        rig.planned(), rig.land()
    assert second.num_tokens == 12 and rig.plan(preempt("b")) is None
    plan = rig.planned()
    assert rows(plan)[1] == ("b", 10, 2, True) and plan.copies.forks[0].num_tokens == 2
    assert (second.num_recomputed_tokens, second.num_cached_tokens) == (1, 9)


def test_what_is_cached_of_a_sample_itself_comes_before_what_it_shares(make_rig: Any) -> None:
    rig = make_rig(prefix=True, num_blocks=16)
    rig.add("a", num_prompt=10)
    add_fork(rig, "b")
    for _ in range(5):
        rig.planned(), rig.land()
    assert rig.plan(preempt("b")) is None
    plan = rig.planned()
    assert rows(plan)[1] == ("b", 12, 2, True) and plan.copies is None


def test_samples_keep_the_place_of_their_arrival(make_rig: Any) -> None:
    rig = make_rig(prefix=True, max_num_seqs=1)
    rig.add("a", num_prompt=10)
    add_fork(rig, "b", arrival_time=1.0)
    rig.add("c", arrival_time=0.5), rig.add("d", arrival_time=2.0)
    rig.planned(), rig.land()
    assert [view.request_id for view in rig.planner._waiting] == ["c", "b", "d"]


@pytest.mark.parametrize(("num_prompt", "tenant"), [(9, ""), (11, ""), (10, "other")])
def test_who_is_no_sample_of_that_prompt_is_refused(make_rig: Any, num_prompt: int, tenant: str) -> None:
    rig = make_rig(prefix=True)
    rig.add("a", num_prompt=10)
    with pytest.raises(RequestError, match="request 'b' has not the prompt and tenant of 'a'"):
        add_fork(rig, "b", num_prompt, tenant=tenant)
    assert rig.planner.requests.keys() == {"a"} and not rig.planner._forks._families


def test_nothing_is_kept_of_samples_that_have_ended(make_rig: Any) -> None:
    rig = make_rig(prefix=True)
    first, second = rig.add("a", num_prompt=10), add_fork(rig, "b")
    rig.planned(), rig.land(), rig.planned(), rig.land()
    assert len(rig.planner._forks._families) == 2
    for request in (first, second):
        rig.planner.finish(request, FinishReason.STOP)
    assert not rig.planner._forks._families
