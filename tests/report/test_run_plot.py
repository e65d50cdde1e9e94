"""The picture of a run: a legend stands outside its panel, so it covers no curve."""

from __future__ import annotations

import pytest

from llmkit import VirtualClock
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.report.run_plot import run_figure, run_picture
from llmkit.types import SamplingParams
from llmkit.workload.driver import run_workload
from llmkit.workload.requests import TimedRequest
from tests.workload.harness import fake_target


def test_legends_cover_nothing() -> None:
    recorder = MetricsRecorder()
    requests = [TimedRequest(0.0, (1,) * (3 + number), 2 + 3 * number) for number in range(12)]
    run_workload(fake_target(), requests, SamplingParams(temperature=0.0), recorder)
    figure = run_figure(recorder)
    figure.canvas.draw()
    legends = [(axes, legend) for axes in figure.axes if (legend := axes.get_legend())]
    assert [len(legend.get_texts()) for _, legend in legends] == [2, 3]
    for axes, legend in legends:
        box = legend.get_window_extent()
        assert box.y0 >= axes.bbox.y1 and box.y1 <= figure.bbox.y1, "outside its panel, inside the picture"
        assert not any(box.overlaps(other.get_tightbbox()) for other in figure.axes if other is not axes)


def test_while_nobody_is_there_the_curves_are_at_zero() -> None:
    recorder, clock = MetricsRecorder(), VirtualClock()
    requests = [TimedRequest(arrival, (1, 2, 3), 5) for arrival in (0.0, 7.0)]
    run_workload(fake_target(clock), requests, SamplingParams(temperature=0.0), recorder)
    for axes in run_figure(recorder).axes[:3]:
        (times, values), *_ = ((list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines())
        until = next(time for time in times if time > 1.0)  # a value holds from the time before to its own
        assert until == pytest.approx(7.0) and values[times.index(until)] == 0
        assert all(value > 0 for time, value in zip(times, values, strict=True) if time != until)


def test_a_run_without_steps_is_drawn_as_well() -> None:
    recorder = MetricsRecorder()
    recorder.start(0.0)
    assert not any(axes.get_legend() for axes in run_figure(recorder).axes)
    assert run_picture(recorder).startswith(b"\x89PNG")
