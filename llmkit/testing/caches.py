"""The conformance kit for KV-cache allocators: any subclass of `CacheAllocator`, from any distribution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from random import Random
from typing import Any

from llmkit.batching import ContinuousBatching
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.scheduler import Scheduler
from llmkit.testing.chaos import Chaos
from llmkit.testing.coverage import Coverage
from llmkit.testing.grouped import grouped
from llmkit.testing.ledger import Ledger
from llmkit.testing.schedulers import build_cache, build_scheduler, check_part
from llmkit.testing.walk import Walk
from llmkit.testing.worlds import Draws, draw_world, windowed
from llmkit.types import Request


def check_cache(
    cache: type[CacheAllocator],
    *,
    options: Mapping[str, Any] | None = None,
    schedulers: Sequence[type[Scheduler]] = (ContinuousBatching, Chaos),
    depths: Sequence[int] = (0, 1, 2),
    seeds: Iterable[int] = range(60),
) -> Coverage:
    """Audit `cache` alone, then under an engine; AssertionError, with the seed, at the first thing that is wrong.

    Alone: random operations against a book of what was handed out. Under an engine: the walks of `check_scheduler`
    with ordinary batching and with `Chaos`. Every fourth seed comes a second time, with a window, and another with
    several groups of layers where the cache `is_groupable`. `options` fix settings of the cache. Returns what the walks
    went through.
    """
    check_part(cache, CacheAllocator, options or {})
    coverage = Coverage()
    for seed, has_window, has_groups in chain.from_iterable(_turns(seed, cache.is_groupable) for seed in seeds):
        audit(grouped(cache, has_small_pools=False) if has_groups else cache, seed, options or {}, 100, has_window)
        world = windowed(draw_world(seed)) if has_window else draw_world(seed)
        for scheduler in schedulers:
            for depth in depths:
                built = build_scheduler(scheduler, world.scheduler_options, {})
                allocator = build_cache(grouped(cache) if has_groups else cache, world.spec, options or {})
                coverage += Walk(world, built, allocator, depth, is_strict=scheduler is not Chaos).run()
    assert coverage.num_walks, "nothing was checked: seeds, schedulers and depths must not be empty"
    return coverage


def _turns(seed: int, is_groupable: bool) -> list[tuple[int, bool, bool]]:
    """Each seed plain; every fourth with a window as well, and another with groups, the first of which may have one."""
    turns = [(seed, False, False)]
    if seed % 4 == 0:
        turns.append((seed, True, False))
    if seed % 4 == 2 and is_groupable:
        turns.append((seed, seed % 8 == 6, True))
    return turns


def audit(
    cache: type[CacheAllocator],
    seed: int,
    options: Mapping[str, Any],
    num_operations: int = 100,
    has_window: bool = False,
) -> Ledger:
    """One random walk over an allocator alone; AssertionError, with the seed, at the first broken promise."""
    random = Random(seed)
    spec = CacheSpec(random.randint(4, 24), random.choice((1, 2, 3, 4, 8)))
    spec = replace(spec, window=Random(seed + 1).randint(1, spec.num_slots) if has_window else None)
    ledger = Ledger(build_cache(cache, spec, options))
    draws = Draws(random, spec)
    requests = [draws.request(str(number), number, 0) for number in range(random.randint(1, 6))]
    for request in requests:
        request.max_num_tokens = min(request.max_num_tokens, spec.num_slots)
    try:
        for _ in range(num_operations):
            one, other = random.choice(requests), random.choice(requests)
            if not ledger.fork(one, other, random.randint(1, 9)):
                _operate(ledger, random, one)
        for request in requests:
            ledger.free(request)
        for request in requests:
            length = request.max_num_tokens
            assert ledger.allocate(request, length), f"{length} tokens were refused, with the pool alone"
            ledger.free(request)
    except Exception as error:
        what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise AssertionError(f"{cache.__name__} alone, {spec}, seed {seed}: {what}") from error
    return ledger


def _operate(ledger: Ledger, random: Random, request: Request) -> None:
    reach = len(ledger.table(request)) * ledger.block_size
    die = random.random()
    if die < 0.6:
        num_cached = 0 if reach else ledger.match(request)
        ledger.allocate(request, min(max(reach, num_cached) + random.randint(1, 9), request.max_num_tokens))
    elif die < 0.75:
        ledger.truncate(request, random.randint(0, request.max_num_tokens))
    elif die < 0.85:
        ledger.commit(request, min(reach, request.num_tokens))
    else:
        ledger.free(request)
