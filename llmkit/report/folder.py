"""The folder of one run: results, requests, steps, trace, page and the composed config."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.records import RequestRecord, StepRecord
from llmkit.report.page import write_page
from llmkit.report.trace import write_trace_events


def write_run(run_dir: Path, result: Mapping[str, Any], recorder: MetricsRecorder, config_text: str = "") -> list[Path]:
    """Write everything; returns the files a person would open first."""
    run_dir.mkdir(parents=True, exist_ok=True)
    start = recorder.started_at
    write_result(run_dir, result, config_text)
    write_jsonl(run_dir / "requests.jsonl", (request_row(record, start) for record in recorder.requests.values()))
    write_jsonl(run_dir / "steps.jsonl", (step_row(record, start) for record in recorder.steps))
    write_trace_events(run_dir / "trace.json.gz", recorder)
    write_page(run_dir / "report.html", result, recorder)
    return [run_dir / "report.html", run_dir / "result.json"]


def write_result(run_dir: Path, result: Mapping[str, Any], config_text: str = "") -> Path:
    """Write `result.json`, and `config.yaml` if there is a config."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if config_text:
        (run_dir / "config.yaml").write_text(config_text, encoding="utf-8")
    path = run_dir / "result.json"
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def request_row(record: RequestRecord, start: float) -> dict[str, Any]:
    """One line of `requests.jsonl`: times in seconds from the start of the run, latencies in milliseconds."""
    row = asdict(record)
    del row["token_times"]
    for name in ("arrival_time", "deadline", "first_scheduled_time", "finished_time"):
        row[name] = None if row[name] is None else row[name] - start
    for name in ("ttft", "tpot", "e2el"):
        value = getattr(record, name)
        row[f"{name}_ms"] = None if value is None else value * 1e3
    row["itl_ms"] = [round(gap * 1e3, 4) for gap in record.itl]
    return row


def step_row(record: StepRecord, start: float) -> dict[str, Any]:
    """One line of `steps.jsonl`: times in seconds from the start of the run."""
    row = asdict(record)
    for name in ("planned_at", "launched_at", "sent_at", "landed_at", "finished_at"):
        row[name] -= start
    return row
