"""What `make nightly` does with one pair of scheduler and cache: walks, hypothesis rules, fault cells."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from llmkit import Registry, load_plugins
from llmkit.interfaces.cache import CacheAllocator
from llmkit.interfaces.scheduler import Scheduler
from llmkit.testing.coverage import Coverage
from llmkit.testing.grouped import grouped
from llmkit.testing.machine import WalkMachine, walk_machine
from llmkit.testing.schedulers import build_cache, build_scheduler
from llmkit.testing.walk import Walk
from llmkit.testing.worlds import Rule, World, draw_world, windowed
from llmkit.types import Request
from tests.nightly.faults import draw_cells, run_cell

DEPTHS = (0, 1, 2)
RULES_PER_EXAMPLE = 30
"""About so many of the 50 that an example may have."""
MOST_FAILURES = 3
"""After so many a pair is not walked any further."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Registered names of a scheduler and a cache."""

    scheduler: str
    cache: str

    def __str__(self) -> str:
        return f"{self.scheduler} on {self.cache}"

    def load(self) -> tuple[type[Scheduler], type[CacheAllocator]]:
        """Their classes."""
        return known().get("scheduler", self.scheduler).load(), known().get("cache", self.cache).load()


@dataclass(frozen=True, slots=True)
class Budget:
    """How much one pair gets: checked steps, hypothesis rules, fault cells; and where seeds begin."""

    steps: int
    rules: int
    cells: int
    seed: int


@dataclass(slots=True)
class Tally:
    """What came of one pair. `failures` are the first lines of the messages, each of which names its seed."""

    pair: Pair
    coverage: Coverage = field(default_factory=Coverage)
    last_seed: int = 0
    step_seconds: float = 0.0
    num_rules: int = 0
    rule_seconds: float = 0.0
    num_cells: int = 0
    num_cells_raised: int = 0
    failures: list[str] = field(default_factory=list)


@cache
def known() -> Registry:
    """What is registered."""
    return load_plugins()[0]


def all_pairs() -> list[Pair]:
    """Every registered scheduler with every registered cache."""
    return [Pair(one, other) for one in known().names("scheduler") for other in known().names("cache")]


def run_pair(job: tuple[Pair, Budget]) -> Tally:
    """All that a pair gets."""
    pair, budget = job
    logging.disable(logging.CRITICAL)  # what is contained is logged with its traceback
    tally = Tally(pair)
    try:
        scheduler, cache = pair.load()
        for part in (walk_pair, rule_pair, fault_pair):
            _note(tally, partial(part, tally, scheduler, cache, budget))
    finally:
        logging.disable(logging.NOTSET)
    return tally


def walk_pair(tally: Tally, scheduler: type[Scheduler], cache: type[CacheAllocator], budget: Budget) -> None:
    """Walks from seed to seed, depths in turn, until the steps are spent."""
    started, tally.last_seed = time.process_time(), budget.seed - 1
    while tally.coverage.num_steps < budget.steps and len(tally.failures) < MOST_FAILURES:
        tally.last_seed += 1
        world = world_of(tally.last_seed)
        for depth in DEPTHS:
            walk = walk_of(scheduler, cache, tally.last_seed, depth, world)
            _note(tally, walk.run)
            tally.coverage += walk.coverage
    tally.step_seconds = time.process_time() - started


def world_of(number: int) -> World:
    """Every fourth seed has a window, and so do some of those with groups."""
    return draw_world(number) if number % 4 and number % 16 != 6 else windowed(draw_world(number))


def walk_of(
    scheduler: type[Scheduler], cache: type[CacheAllocator], number: int, depth: int, world: World | None = None
) -> Walk:
    """The walk of seed `number`, through its world; every fourth has several groups of layers where the cache can."""
    world = world or world_of(number)
    built = build_scheduler(scheduler, world.scheduler_options, {})
    kind = grouped(cache) if cache.is_groupable and number % 4 == 2 else cache
    return Walk(world, built, build_cache(kind, world.spec, cache_options(cache, number)), depth)


def cache_options(cache: type[CacheAllocator], number: int) -> dict[str, Any]:
    """Options a cache may have, in turn: every eviction, and now and then no reuse at all."""
    evictions = known().names("eviction")
    options = cache.Settings.model_fields
    if "prefix" in options and number % 7 == 0:
        return {"prefix": False}
    return {"eviction": evictions[number % len(evictions)]} if "eviction" in options else {}


def rule_pair(tally: Tally, scheduler: type[Scheduler], cache: type[CacheAllocator], budget: Budget) -> None:
    """The state machine at every depth, for about so many rules; what fails is shrunk."""

    started = time.process_time()

    class Counting(WalkMachine):
        def apply(self, rule: Rule, request_id: str = "", request: Request | None = None, number: int = 0) -> None:
            tally.num_rules += 1
            super().apply(rule, request_id, request, number)

    number, examples = budget.seed, max(1, budget.rules // len(DEPTHS) // RULES_PER_EXAMPLE)
    quiet = settings(
        max_examples=examples, stateful_step_count=50, deadline=None, database=None, print_blob=False,
        phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    while tally.num_rules < budget.rules and len(tally.failures) < MOST_FAILURES:
        depth = DEPTHS[number % len(DEPTHS)]
        machine = walk_machine(scheduler, cache, depth, cache_options=cache_options(cache, number))
        run = seed(number)(type("Machine", (Counting, machine), {}))
        _note(tally, partial(run_state_machine_as_test, run, settings=quiet), f", rules of seed {number}")
        number += 1
    tally.rule_seconds = time.process_time() - started


def fault_pair(tally: Tally, scheduler: type[Scheduler], cache: type[CacheAllocator], budget: Budget) -> None:
    """Cells of hook, call and exception."""
    for cell in draw_cells(budget.seed, budget.cells):
        tally.num_cells += 1
        tally.num_cells_raised += bool(_note(tally, partial(run_cell, cell, scheduler, cache)))


def _note(tally: Tally, run: Callable[[], Any], what: str = "") -> Any:
    """Run, or keep the first line of what is wrong. What hypothesis has shrunk goes to stderr."""
    try:
        return run()
    except Exception as error:
        line = str(error).partition("\n")[0] or type(error).__name__
        tally.failures.append(f"{tally.pair}{what}: {line}")
        print(tally.failures[-1], *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
