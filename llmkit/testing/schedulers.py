"""The conformance kit for schedulers: any subclass of `Scheduler`, from any distribution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from llmkit.errors import no_such_option
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.scheduler import Scheduler
from llmkit.overrides import complaints
from llmkit.testing.coverage import Coverage
from llmkit.testing.reference import ReferenceCache, ReservingCache
from llmkit.testing.walk import Walk
from llmkit.testing.worlds import draw_world

REFERENCE_CACHES: tuple[type[CacheAllocator], ...] = (ReferenceCache, ReservingCache)


def check_scheduler(
    scheduler: type[Scheduler],
    *,
    options: Mapping[str, Any] | None = None,
    caches: Sequence[type[CacheAllocator]] = REFERENCE_CACHES,
    depths: Sequence[int] = (0, 1, 2),
    seeds: Iterable[int] = range(60),
    is_strict: bool = True,
) -> Coverage:
    """Walk `scheduler` through small random worlds; AssertionError, with the seed, at the first thing that is wrong.

    Checked: every request gets exactly the tokens it would get alone; blocks, slots and token counts add up after
    every step; everything comes back at the end; no step schedules nothing while something could run; tokens keep
    coming; what it promises of fairness (`may_pass`, `service`) holds; no member looks like a misspelt override.
    `options` fix settings of the scheduler, the limits are drawn. Returns what the walks went through.
    """
    check_part(scheduler, Scheduler, options or {})
    coverage = Coverage()
    for seed in seeds:
        world = draw_world(seed)
        for cache in caches:
            for depth in depths:
                built = build_scheduler(scheduler, world.scheduler_options, options or {})
                walk = Walk(world, built, build_cache(cache, world.spec, {}), depth, is_strict)
                coverage += walk.run()
    assert coverage.num_walks, "nothing was checked: seeds, caches and depths must not be empty"
    return coverage


def check_part(part: object, contract: type, options: Mapping[str, Any]) -> None:
    """Refuse, in one line, what is no class of that contract, misspells an override or lacks one of the `options`."""
    assert isinstance(part, type) and issubclass(part, contract), f"{part!r} is no subclass of {contract.__name__}"
    assert not complaints(part), "; ".join(complaints(part))
    settings: Any = part.Settings  # type: ignore[attr-defined]
    is_known = isinstance(settings, type) and issubclass(settings, contract.Settings)  # type: ignore[attr-defined]
    assert is_known, f"{part.__name__}.Settings must subclass {contract.__name__}.Settings"
    for option in options:
        assert option in settings.model_fields, no_such_option(settings, option)


def build_scheduler(scheduler: type[Scheduler], drawn: Mapping[str, int], options: Mapping[str, Any]) -> Scheduler:
    """A scheduler with `options` and those `drawn` limits that its settings know and allow."""
    known = {name: value for name, value in drawn.items() if name in scheduler.Settings.model_fields}
    try:
        return scheduler(scheduler.Settings(**{**known, **options}))
    except ValidationError as error:
        refused = {str(part) for problem in error.errors() for part in problem["loc"]}
        allowed = {name: value for name, value in known.items() if name not in refused}
        return scheduler(scheduler.Settings(**{**allowed, **options}))


def build_cache(cache: type[CacheAllocator], spec: CacheSpec, options: Mapping[str, Any]) -> CacheAllocator:
    """A cache over a pool of that size."""
    return cache(cache.Settings(**options), spec)
