"""Numbers for reading."""

from __future__ import annotations

import io

from rich.console import Console

from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.records import RequestRecord, StepRecord
from llmkit.metrics.summary import GoodputLimits, summarise
from llmkit.report.run_plot import run_picture
from llmkit.report.summary_table import milliseconds, number, overview, percent, print_summary


def test_numbers_have_units_separators_and_a_sign_for_nothing() -> None:
    assert number(1234567) == "1,234,567"
    assert number(1234.56, "tok/s") == "1,234.6 tok/s"
    assert number(None, "tok/s") == "-"
    assert milliseconds(1.234) == "1.23"
    assert milliseconds(123.456) == "123.5"
    assert (percent(0.125), percent(None)) == ("12.5 %", "-")


def test_goodput_and_gpu_idle_are_shown_only_where_they_exist() -> None:
    recorder = MetricsRecorder()
    recorder.stop(2.0)
    recorder.requests["a"] = RequestRecord("a", 0.0, 3, 1, finish_reason="stop", token_times=[0.5])
    plain = dict(overview(summarise(recorder)))
    assert "goodput" not in plain
    assert "GPU idle" not in plain
    assert "deadlines met" not in plain and "tenants" not in plain
    assert (plain["input throughput"], plain["output throughput"]) == ("1.5 tok/s", "0.5 tok/s")
    recorder.requests["a"].deadline = 0.4
    recorder.steps.append(StepRecord(*[0] * 17, sent_at=0.0, device_seconds=0.5))
    full = dict(overview(summarise(recorder, GoodputLimits(ttft_ms=600), device="cuda")))
    assert full["goodput"] == "0.50 req/s"
    assert full["deadlines met"] == "0.0 %"
    assert full["GPU idle"] == "at least 75.0 %"


def test_tenants_are_shown_where_there_are_several() -> None:
    recorder = MetricsRecorder()
    recorder.stop(2.0)
    for name, tenant, first in (("a", "x", 0.25), ("b", "y", 0.5), ("c", "y", 1.5)):
        recorder.requests[name] = RequestRecord(name, 0.0, 3, 1, tenant=tenant, finish_reason="stop")
        recorder.requests[name].token_times = [first]
    result = summarise(recorder)
    assert dict(overview(result))["tenants"] == "2, mean ttft 250.0 to 1,000.0 ms"
    assert result["tenants"]["y"] == {
        "completed": 2,
        "total_output_tokens": 2,
        "mean_ttft_ms": 1000.0,
        "mean_e2el_ms": 1000.0,
    }


def test_an_empty_run_can_be_printed_and_drawn() -> None:
    text = io.StringIO()
    print_summary(Console(file=text, width=80), "nothing", summarise(MetricsRecorder(), interrupted=True))
    assert "0 completed, 0 failed, 0 aborted of 0 (interrupted)" in text.getvalue()
    assert run_picture(MetricsRecorder()).startswith(b"\x89PNG")
