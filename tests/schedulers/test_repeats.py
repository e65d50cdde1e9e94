"""Schedulers that let steps repeat unasked get the very plans that asking for every step would have given."""

import pytest

from llmkit import CacheAllocator, ContinuousBatching
from llmkit.testing.worlds import draw_world
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.prefix_aware import PrefixAware
from llmkit_schedulers.sjf import ShortestJobFirst
from tests.engine.test_steady import play


def asked_always(base: type[ContinuousBatching]) -> type[ContinuousBatching]:
    """The same choices, but asked for every step."""
    return type("Asked", (base,), {"repeats": lambda self, num_waiting, num_free_seqs: False})


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("cache", [PagedCache, ContiguousCache])
@pytest.mark.parametrize("scheduler", [ShortestJobFirst, PrefixAware])
def test_repeated_steps_are_those_that_asking_would_give(
    scheduler: type[ContinuousBatching], cache: type[CacheAllocator], depth: int
) -> None:
    num_repeated, options = 0, {"prefix": False} if cache is PagedCache else {}
    for seed in range(20):
        world = draw_world(seed)
        steps, num = play(world, scheduler, cache, depth, **options)
        asked, none = play(world, asked_always(scheduler), cache, depth, **options)
        assert none == 0 and steps == asked, f"seed {seed}"
        num_repeated += num
    assert num_repeated > 150
