"""Requests longer than the pool, whose layers all have a window: what they are granted, hold and tell the device."""

import numpy as np
import pytest

from llmkit.engine.inputs import InputBuilder
from llmkit.engine.planner import Planner
from llmkit.engine.pools import window_of
from llmkit.interfaces.attention import AttentionRequirements, LayerSpec
from llmkit.interfaces.cache import CacheSpec
from llmkit.testing.invariants import check_planner
from llmkit.types import BlockTableEdit, ScheduledRequest, StepPlan
from llmkit_caches.paged import PagedCache, PagedSettings
from tests.engine.conftest import Rig


@pytest.fixture
def windowed() -> Rig:
    """Four blocks of four, a window of six keys."""
    rig = Rig()
    rig.allocator = PagedCache(PagedSettings(), CacheSpec(4, 4, 6))
    rig.planner = Planner(rig.scheduler, rig.allocator)
    return rig


def test_a_prompt_longer_than_the_pool_runs_in_chunks_that_fit(windowed: Rig) -> None:
    one = windowed.add("a", 40)
    ends = []
    while one.num_computed_tokens < 40:
        ends.append(windowed.planned().scheduled[0].start)
        windowed.land()
        assert windowed.allocator.stats().num_used_blocks <= 2
    assert ends == [0, 16, 24, 32]


def test_what_is_in_flight_has_to_land_before_the_window_moves_on(windowed: Rig) -> None:
    one = windowed.add("a", 40)
    windowed.planned()
    assert windowed.plan() is None, "all blocks hold what is in flight"
    windowed.land()
    assert windowed.planned().scheduled[0].start == 16 and one.num_preemptions == 0
    windowed.land()


def test_blocks_are_free_when_the_step_that_left_them_behind_has_landed(windowed: Rig) -> None:
    windowed.add("a", 9)
    windowed.planned()
    assert windowed.allocator.stats().num_used_blocks == 3
    windowed.land()
    (view,) = windowed.planner._running
    assert windowed.allocator.stats().num_used_blocks == 2 == view.num_blocks
    assert windowed.planner.num_unwritten_slots == 12 - 9


def test_a_preempted_request_goes_on_from_its_window(windowed: Rig) -> None:
    """Of its blocks only those that the window reaches are taken again, and the device hears of no others."""
    one = windowed.add("a", 12)
    windowed.planned()
    windowed.land()
    windowed.plan(lambda queue, step: step.preempt(queue.running[0]) and None)
    plan = windowed.planned()
    assert plan.scheduled[0].start == 12 and one.num_released_blocks == 1
    assert [(edit.start, len(edit.blocks)) for edit in plan.edits] == [(1, 3)]
    windowed.land()
    check_planner(windowed.planner, [])


@pytest.mark.parametrize(
    ("windows", "wanted"), [((None, None), None), ((8, None), None), ((8, 4), 8), ((8, 8), 8), ((3,), 3)]
)
def test_the_widest_window_counts_if_every_layer_has_one(windows: tuple[int | None, ...], wanted: int | None) -> None:
    layers = tuple(LayerSpec(2, 2, 8, 1.0, window) for window in windows)
    assert window_of(AttentionRequirements("cpu", "float32", 4, layers)) == wanted


def test_what_no_query_sees_is_not_in_the_table() -> None:
    builder = InputBuilder(2, 32, 4, window=6)
    edits = (BlockTableEdit(0, 0, (10, 11, 12, 13, 14)), BlockTableEdit(1, 0, (20, 21)))
    rows = ScheduledRequest("a", 0, 13, 4, True, 1), ScheduledRequest("b", 1, 5, 1, True, 1)
    plan = StepPlan(0, rows, (), edits)
    builder.apply(plan)
    # The first row's first query sees 8 to 13, the second row's 0 to 5.
    assert builder.build(plan).block_table.tolist() == [[12, 12, 12, 13, 14], [20, 21, 20, 20, 20]]
    assert np.array_equal(builder.block_tables[0, :5], [10, 11, 12, 13, 14])
