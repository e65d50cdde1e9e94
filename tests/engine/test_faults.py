"""Faults stay where they are: a sample of the cells that `make nightly` goes through, on every pair of two and two."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import product
from typing import Any

import pytest

from llmkit.engine.engine import Engine
from llmkit.engine.residency import Residency
from llmkit.errors import PluginError
from llmkit.testing import grouped
from llmkit.types import Request, SamplingParams
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous
from llmkit_schedulers.priority import Priority
from tests.nightly.faults import (
    EXCEPTIONS,
    FAULTY,
    HOOKS,
    NUM_WITNESSES,
    Cell,
    Trap,
    build_engine,
    draw_cells,
    draw_requests,
    run_cell,
    set_trap,
)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """What is contained is logged with its traceback."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


PAIRS = [*product([Continuous, Priority], [PagedCache, ContiguousCache]), (Continuous, grouped(PagedCache))]


@pytest.mark.parametrize(("scheduler", "cache"), PAIRS)
def test_a_fault_anywhere_leaves_its_witnesses_alone(scheduler: Any, cache: Any) -> None:
    raised: Counter[str] = Counter()
    for cell in draw_cells(seed=7, number=6 * len(HOOKS)):
        raised[cell.hook] += run_cell(cell, scheduler, cache)
    called = [hook for hook in HOOKS if hook != "fork" or cache is not ContiguousCache]
    assert min(raised[hook] for hook in called) > 0, raised
    assert raised.total() > 3 * len(HOOKS), raised


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("depth", [0, 2])
def test_the_first_call_of_every_hook_may_raise(hook: str, depth: int, exception: type[BaseException]) -> None:
    assert run_cell(Cell(hook, 1, exception, depth, seed=5), Continuous, PagedCache)


def test_blocks_reserved_for_a_step_that_fails_reach_the_device_with_the_next() -> None:
    """Steps repeat: one row has got its next block when the row behind it fails to get one."""
    assert run_cell(Cell("allocate", 2, StopIteration, 2, 637), Continuous, PagedCache)


@pytest.mark.parametrize("retries", [True, False])
def test_blocks_that_an_allocator_failed_to_free_serve_the_next_request(
    retries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is in flight any more that could land and free them then."""
    engine = build_engine(Continuous, PagedCache, depth=0)
    num_slots = engine.planner.allocator.spec.num_slots
    if not retries:
        monkeypatch.setattr(Residency, "retry", lambda self: None)
    for name in (FAULTY, "next"):
        engine.add(Request(name, [1] * (num_slots - 2), SamplingParams(max_tokens=2, ignore_eos=True)))
    set_trap(engine, Trap(Cell("free", 1, ValueError, 0, 0)))
    ended = [output.request_id for _ in range(60) for output in engine.step() if output.completion]
    assert ended == ([FAULTY, "next"] if retries else [FAULTY])


def test_cells_go_through_all_hooks_and_exceptions() -> None:
    cells = list(draw_cells(seed=0, number=len(HOOKS) * len(EXCEPTIONS)))
    assert len({(cell.hook, cell.exception) for cell in cells}) == len(HOOKS) * len(EXCEPTIONS)
    assert {MemoryError, KeyboardInterrupt, ValueError, PluginError} <= set(EXCEPTIONS)
    assert len(draw_requests(3)) == NUM_WITNESSES + 1 and cells == list(draw_cells(seed=0, number=len(cells)))


def test_the_cells_bite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Landing that is cut short, or a block that is never freed, would be seen."""

    def uncontained(self: Any, progress: Any, add: Any, *token: Any) -> None:
        reason = add(*token)
        if reason is not None:
            self._finish(progress.request, reason)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_hear", uncontained)
        with pytest.raises(AssertionError, match=r"ValueError in call 1 of heed, depth 0, seed 5: no end after"):
            run_cell(Cell("heed", 1, ValueError, 0, 5), Continuous, PagedCache)
    monkeypatch.setattr(Residency, "retry", lambda self: None)
    monkeypatch.setattr(Residency, "land", lambda self, step_id: setattr(self, "num_landed_steps", step_id + 1))
    with pytest.raises(AssertionError):
        run_cell(Cell("free", 1, ValueError, 2, 5), Continuous, PagedCache)
