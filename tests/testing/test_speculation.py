"""The contracts carry steps that propose several tokens, verify them and reject some."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from llmkit import CacheAllocator, CacheSpec, Request, SamplingParams, load_plugins
from llmkit.testing import continuation
from llmkit_caches.sharing import SharingCache
from tests.testing.speculation import SpeculativeOracle, Speculator

MAX_LEN, VOCAB_SIZE = 48, 5


def build(name: str, num_blocks: int, block_size: int, window: int | None = None) -> CacheAllocator:
    component: Any = load_plugins()[0].get("cache", name).load()
    cache: CacheAllocator = component(component.Settings(), CacheSpec(num_blocks, block_size, window))
    return cache


def draw_requests(seed: int, number: int = 7) -> list[Request]:
    """Prompts that begin alike."""
    random = Random(seed)
    head = [random.randrange(VOCAB_SIZE) for _ in range(9)]
    requests = []
    for name in range(number):
        prompt = head[: random.randint(1, 9)] + [random.randrange(VOCAB_SIZE) for _ in range(random.randint(0, 5))]
        params = SamplingParams(max_tokens=random.randint(1, 30))
        requests.append(Request(str(name), prompt, params, seed=name % 2))
    return requests


def serve(cache: CacheAllocator, num_proposed: int, hit_rate: float, seed: int) -> Speculator:
    """Every request gets the tokens of decoding one by one; nothing is left behind."""
    requests = draw_requests(seed)
    wanted = [continuation(request, VOCAB_SIZE, frozenset(), MAX_LEN)[0] for request in requests]
    executor = SpeculativeOracle(cache.spec, 4, MAX_LEN, hit_rate, seed)
    speculator = Speculator(cache, executor, num_proposed)
    speculator.serve(requests)
    assert [request.output_token_ids for request in requests] == wanted
    cache.check()
    assert not cache.census() and not cache.stats().num_used_blocks
    return speculator


@pytest.mark.parametrize("name", ["paged", "radix", "contiguous"])
@pytest.mark.parametrize("hit_rate", [0.0, 0.7, 1.0])
def test_tokens_are_those_of_decoding_one_by_one(name: str, hit_rate: float) -> None:
    """Pools hold a longest request and a half, so that look-ahead and preemption meet."""
    cases = ((1, 4), (3, 9), (4, 2), (8, 5))
    served = [serve(build(name, 72 // size, size), ahead, hit_rate, seed=size) for size, ahead in cases]
    for one in served:
        share = one.executor.num_accepted / one.executor.num_proposed
        assert share == hit_rate if hit_rate in (0, 1) else 0.1 < share < 0.9
    assert sum(one.executor.num_proposed for one in served) > 150
    assert sum(one.num_preemptions for one in served) > 10
    assert (sum(one.num_cached for one in served) > 50) == (name != "contiguous")
    assert (sum(one.num_given_back for one in served) > 30) == (name != "contiguous" and hit_rate < 1)


@pytest.mark.parametrize("name", ["paged", "radix"])
@pytest.mark.parametrize("hit_rate", [0.0, 0.7, 1.0])
def test_blocks_behind_a_window_are_released_meanwhile(name: str, hit_rate: float) -> None:
    """What is rejected is never far enough back to need them again."""
    served = [serve(build(name, 48 // size, size, window=6), 5, hit_rate, seed=size) for size in (1, 4)]
    assert all(one.num_released > 5 for one in served)
    assert sum(one.num_preemptions for one in served) > 2


def test_it_takes_fewer_steps() -> None:
    alone, ahead = (serve(build("paged", 48, 4), number, 1.0, 1) for number in (0, 4))
    assert alone.executor.num_proposed == 0 and ahead.num_steps < alone.num_steps / 2


def publishes_proposals(commit: Callable[..., None]) -> Callable[..., None]:
    def early(self: SharingCache, request: Request, num_computed_tokens: int) -> None:
        commit(self, request, len(self.block_table(request)) * self.spec.block_size)

    return early


def keeps_the_wrong_end(truncate: Callable[..., None]) -> Callable[..., None]:
    def hasty(self: SharingCache, request: Request, upto: int) -> None:
        truncate(self, request, upto - self.spec.block_size)

    return hasty


@pytest.mark.mutant
@pytest.mark.parametrize(("method", "slip"), [("commit", publishes_proposals), ("truncate", keeps_the_wrong_end)])
def test_slips_are_noticed(method: str, slip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharingCache, method, slip(getattr(SharingCache, method)))
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(4):
            serve(build("paged", 24, 3), 4, 0.5, seed)
