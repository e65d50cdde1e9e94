"""A run as a Chrome trace: open `trace.json.gz` at https://ui.perfetto.dev or chrome://tracing.

Process "engine": host work, one slice a step, counters. Process "requests": one track each, queued, prefill, decode.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.records import RequestRecord, StepRecord

ENGINE, REQUESTS = 1, 2
HOST_TRACK, STEP_TRACK = 1, 2
Event = dict[str, Any]


def write_trace_events(path: Path, recorder: MetricsRecorder) -> None:
    """Write the trace, gzipped; times are microseconds from the start of the run."""
    events = list(trace_events(recorder))
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)


def trace_events(recorder: MetricsRecorder) -> Iterator[Event]:
    """All events of the trace."""
    yield from _names(ENGINE, "engine", {HOST_TRACK: "host", STEP_TRACK: "steps"})
    yield from _names(REQUESTS, "requests", {n: r.request_id for n, r in enumerate(recorder.requests.values(), 1)})
    landed_before = recorder.started_at
    for step in recorder.steps:
        yield from _step(step, landed_before, recorder.started_at)
        landed_before = step.landed_at
    for track, record in enumerate(recorder.requests.values(), 1):
        yield from _request(record, track, recorder.started_at)


def _names(process: int, name: str, tracks: dict[int, str]) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    for track, track_name in tracks.items():
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": track_name}}


def _slice(name: str, process: int, track: int, begin: float, end: float, **args: Any) -> Event:
    """A slice from `begin` to `end`, seconds since the start of the run."""
    times = {"ts": round(begin * 1e6, 3), "dur": round(max(0.0, end - begin) * 1e6, 3)}
    return {"ph": "X", "name": name, "pid": process, "tid": track, **times, "args": args}


def _step(step: StepRecord, landed_before: float, start: float) -> Iterator[Event]:
    """Steps that overlap are drawn one after the other, each from when the one before it landed."""
    yield _slice("plan", ENGINE, HOST_TRACK, step.planned_at - start, step.launched_at - start, step=step.step_id)
    yield _slice("take in", ENGINE, HOST_TRACK, step.landed_at - start, step.finished_at - start, step=step.step_id)
    begin = max(step.launched_at, landed_before) - start
    counts = {"rows": step.num_rows, "tokens": step.num_tokens, "recomputed": step.num_recomputed_tokens}
    yield _slice(f"step {step.step_id}", ENGINE, STEP_TRACK, begin, step.landed_at - start, **counts)
    counters = {
        "running": step.num_running,
        "waiting": step.num_waiting,
        "blocks used": step.num_used_blocks,
        "blocks cached": step.num_cached_blocks,
    }
    for name, value in counters.items():
        yield {"ph": "C", "name": name, "pid": ENGINE, "ts": round(begin * 1e6, 3), "args": {name: value}}


def _request(record: RequestRecord, track: int, start: float) -> Iterator[Event]:
    """Its phases, as far as it came."""
    first = record.token_times[0] if record.token_times else None
    last = record.token_times[-1] if record.token_times else None
    marks = (record.arrival_time, record.first_scheduled_time, first, last)
    args = {
        "prompt": record.num_prompt_tokens,
        "output": record.num_output_tokens,
        "preemptions": record.num_preemptions,
        "finish_reason": record.finish_reason,
    }
    for name, begin, end in zip(("queued", "prefill", "decode"), marks, marks[1:], strict=False):
        if begin is None:
            return
        until = end if end is not None else record.finished_time
        if until is not None:
            yield _slice(name, REQUESTS, track, begin - start, until - start, **args)
        if end is None:
            return
