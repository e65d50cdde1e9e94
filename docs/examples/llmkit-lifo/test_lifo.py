"""llmkit's conformance kit on the plugin, and the one thing that is its own: the order."""

import pytest
from llmkit_lifo import Lifo, LifoSettings

from llmkit import Request, RequestView, SamplingParams
from llmkit.testing import check_scheduler


def view(name: str, arrival_time: float) -> RequestView:
    return RequestView(Request(name, [1, 2, 3], SamplingParams(), arrival_time=arrival_time))


@pytest.mark.parametrize("patience", [0.001, 1e9])
def test_conforms(patience: float) -> None:
    coverage = check_scheduler(Lifo, options={"patience": patience}, seeds=range(20))
    assert coverage.num_walks and coverage.num_preemptions and coverage.num_tokens > 1000


def test_newest_first_until_patience_runs_out() -> None:
    lifo = Lifo(LifoSettings(patience=10.0))
    waiting = [view(f"at {time}", time) for time in (0.0, 1.0, 5.0, 9.0)]
    assert [r.request_id for r in lifo.order_waiting(waiting, now=9.0)] == ["at 9.0", "at 5.0", "at 1.0", "at 0.0"]
    assert [r.request_id for r in lifo.order_waiting(waiting, now=11.5)] == ["at 0.0", "at 1.0", "at 9.0", "at 5.0"]
