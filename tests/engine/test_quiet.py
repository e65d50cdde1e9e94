"""The garbage collector rests while a workload runs, and everything is as before afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from llmkit import SamplingParams, StepEvent, hookimpl
from llmkit.engine.quiet import FULL_EVERY, quiet_collector
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.workload.driver import run_workload
from llmkit.workload.requests import TimedRequest
from tests.tiny_llm import tiny
from tests.workload.harness import fake_target


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[tuple[int, int, int]]:
    """Nothing is frozen before or after a test, and the thresholds stay."""
    before = gc.get_threshold()
    assert gc.get_freeze_count() == 0
    yield before
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)


def test_it_rests_inside_also_when_blocks_are_nested(thresholds: tuple[int, int, int]) -> None:
    with quiet_collector():
        assert gc.get_freeze_count() > 1000
        assert gc.get_threshold() == (*thresholds[:2], FULL_EVERY)
        with quiet_collector():
            pass
        assert gc.get_freeze_count() > 1000


def test_a_fault_inside_changes_nothing() -> None:
    with pytest.raises(KeyError), quiet_collector():
        raise KeyError


def test_what_the_application_froze_stays_frozen(thresholds: tuple[int, int, int]) -> None:
    gc.freeze()
    try:
        with quiet_collector():
            assert gc.get_threshold() == thresholds
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


class Watch:
    """Whether objects were frozen while steps ran."""

    def __init__(self) -> None:
        self.seen: set[bool] = set()

    @hookimpl
    def llmkit_step_finished(self, event: StepEvent) -> None:
        self.seen.add(gc.get_freeze_count() > 1000)


def test_workloads_run_with_it_at_rest() -> None:
    target, watch = fake_target(), Watch()
    target.plugin_manager.register(watch)
    run_workload(target, [TimedRequest(0.0, (1, 2), 3)], SamplingParams(temperature=0.0), MetricsRecorder())
    assert watch.seen == {True}


def test_batches_run_with_it_at_rest(make_llm: object) -> None:
    watch = Watch()
    llm = make_llm(tiny(), plugins=[watch])  # type: ignore[operator]
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
    assert watch.seen == {True}
