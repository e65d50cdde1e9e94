"""The Chrome trace: complete, well formed, and slices of one track never overlap."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmkit.metrics.recorder import MetricsRecorder
from llmkit.report.trace import trace_events, write_trace_events
from llmkit.types import SamplingParams, StepPlan
from llmkit.workload.driver import run_workload
from llmkit.workload.requests import TimedRequest
from tests.workload.harness import fake_target


def recorded(depth: int = 0) -> MetricsRecorder:
    def cost(plan: StepPlan) -> float:
        return 0.01 + 0.001 * plan.num_tokens

    recorder = MetricsRecorder()
    requests = [TimedRequest(0.02 * i, tuple(range(1 + 3 * i)), 1 + i) for i in range(6)]
    requests.append(TimedRequest(0.0, (), 1))
    run_workload(fake_target(cost=cost, depth=depth), requests, SamplingParams(ignore_eos=True), recorder)
    return recorder


def slices(recorder: MetricsRecorder) -> dict[tuple[int, int], list[dict[str, Any]]]:
    tracks = defaultdict(list)
    for event in trace_events(recorder):
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    return tracks


@pytest.mark.parametrize("depth", [0, 1])
def test_one_slice_a_step_and_no_overlap_on_any_track(depth: int) -> None:
    recorder = recorded(depth)
    tracks = slices(recorder)
    assert [event["name"] for event in tracks[1, 2]] == [f"step {step.step_id}" for step in recorder.steps]
    for events in tracks.values():
        events.sort(key=lambda event: event["ts"])
        for before, after in pairwise(events):
            assert before["dur"] >= 0
            assert before["ts"] + before["dur"] <= after["ts"] + 0.01


def test_one_track_a_request_whose_phases_add_up_to_its_latency() -> None:
    recorder = recorded()
    tracks = slices(recorder)
    for track, record in enumerate(recorder.requests.values(), 1):
        events = tracks.get((2, track), [])
        if record.error is not None:
            assert not events
            continue
        assert [event["name"] for event in events] == ["queued", "prefill", "decode"]
        assert events[0]["ts"] == pytest.approx((record.arrival_time - recorder.started_at) * 1e6, abs=0.01)
        assert record.e2el is not None
        assert sum(event["dur"] for event in events) == pytest.approx(record.e2el * 1e6, abs=0.01)


def test_counters_follow_the_steps() -> None:
    recorder = recorded()
    events = [event for event in trace_events(recorder) if event["ph"] == "C"]
    for name, attribute in (
        ("running", "num_running"),
        ("waiting", "num_waiting"),
        ("blocks used", "num_used_blocks"),
    ):
        values = [event["args"][name] for event in events if event["name"] == name]
        assert values == [getattr(step, attribute) for step in recorder.steps]


def test_the_file_is_gzipped_json_that_perfetto_reads(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    recorder = recorded()
    write_trace_events(path, recorder)
    with gzip.open(path, "rt") as file:
        content = json.load(file)
    assert content["traceEvents"] == list(trace_events(recorder))
    names = {event["args"]["name"] for event in content["traceEvents"] if event["ph"] == "M"}
    assert {"engine", "requests", "host", "steps", "w0", "w6"} <= names
