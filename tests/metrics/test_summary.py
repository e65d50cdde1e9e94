"""The formulas, on records whose numbers can be worked out by hand."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import numpy as np
import pytest

from llmkit.metrics.device_time import host_seconds
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.records import RequestRecord, StepRecord
from llmkit.metrics.summary import GoodputLimits, distribution, summarise
from llmkit.report.summary_table import overview


def request(name: str, arrival: float, token_times: list[float], reason: str = "length") -> RequestRecord:
    return RequestRecord(
        name,
        arrival,
        num_prompt_tokens=10,
        num_output_tokens=len(token_times),
        finish_reason=reason,
        first_scheduled_time=arrival,
        token_times=token_times,
    )


def step(launched: float, landed: float, used: int = 1, idle: float = 0.0, **changes: int) -> StepRecord:
    """Planned 0.01 s before its launch, which takes 0.05 s, taken in 0.02 s after it landed; 10 blocks in all."""
    counts = dict.fromkeys(
        ("num_rows", "num_tokens", "num_new_tokens", "num_recomputed_tokens", "num_running", "num_waiting"), 1
    )
    slots = {"num_reserved_slots": used * 4, "num_unwritten_slots": 1}
    blocks = {"num_used_blocks": used, "num_cached_blocks": 0, "num_free_blocks": 10 - used}
    times = {"launched_at": launched, "sent_at": launched + 0.05, "landed_at": landed, "finished_at": landed + 0.02}
    return StepRecord(0, launched - 0.01, idle_before=idle, **times, **(counts | slots | blocks | changes))


def recorded(
    requests: list[RequestRecord], steps: list[StepRecord] | None = None, duration: float = 2.0
) -> MetricsRecorder:
    recorder = MetricsRecorder()
    recorder.stop(duration)
    recorder.requests.update({record.request_id: record for record in requests})
    recorder.steps.extend(steps or [])
    return recorder


TWO = [request("a", 0.0, [0.1, 0.2, 0.4]), request("b", 0.5, [0.8])]


def test_latencies_count_from_the_scheduled_arrival() -> None:
    result = summarise(recorded(TWO))
    assert result["mean_ttft_ms"] == pytest.approx((100 + 300) / 2)
    assert result["mean_e2el_ms"] == pytest.approx((400 + 300) / 2)
    assert result["mean_tpot_ms"] == pytest.approx(150)  # one token alone has no tpot
    assert result["mean_itl_ms"] == pytest.approx((100 + 200) / 2)
    assert result["std_itl_ms"] == pytest.approx(50)


def test_throughputs_are_counts_over_the_duration() -> None:
    result = summarise(recorded(TWO))
    assert (result["completed"], result["failed"], result["aborted"]) == (2, 0, 0)
    assert result["request_throughput"] == pytest.approx(1.0)
    assert result["output_throughput"] == pytest.approx(2.0)
    assert result["total_token_throughput"] == pytest.approx((20 + 4) / 2)


def test_what_failed_or_was_aborted_counts_for_nothing_else() -> None:
    others = [request("c", 0.0, [1.5], "error"), request("d", 0.0, [1.9], "abort")]
    result, alone = summarise(recorded(TWO + others)), summarise(recorded(TWO))
    assert (result["num_prompts"], result["failed"], result["aborted"]) == (4, 1, 1)
    for key in ("completed", "output_throughput", "p99_ttft_ms", "total_input_tokens"):
        assert result[key] == alone[key]


@pytest.mark.parametrize(
    ("limits", "num_good"),
    [
        (GoodputLimits(ttft_ms=1000), 2),
        (GoodputLimits(ttft_ms=200), 1),
        (GoodputLimits(tpot_ms=100), 1),
        (GoodputLimits(e2el_ms=350), 1),
        (GoodputLimits(ttft_ms=200, e2el_ms=350), 0),
    ],
)
def test_goodput_wants_every_limit_met(limits: GoodputLimits, num_good: int) -> None:
    assert summarise(recorded(TWO), limits)["request_goodput"] == pytest.approx(num_good / 2.0)


def test_without_limits_there_is_no_goodput() -> None:
    assert summarise(recorded(TWO), GoodputLimits())["request_goodput"] is None


def test_distribution_is_what_the_standard_library_says() -> None:
    values = np.random.default_rng(0).random(101).tolist()
    numbers = distribution(values)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for percentile in (50, 90, 95, 99):
        assert numbers[f"p{percentile}"] == pytest.approx(cuts[percentile - 1] * 1e3)
    assert numbers["mean"] == pytest.approx(statistics.fmean(values) * 1e3)
    assert numbers["median"] == pytest.approx(statistics.median(values) * 1e3)
    assert numbers["std"] == pytest.approx(statistics.pstdev(values) * 1e3)


def test_nothing_measured_is_null_and_still_json() -> None:
    result = summarise(recorded([], duration=0.0))
    json.dumps(result, allow_nan=False)
    for key in ("request_throughput", "p99_itl_ms", "recompute_tax", "kv_utilisation", "host_us_per_step"):
        assert result[key] is None


def test_cache_shares_are_weighted_by_how_long_a_step_ran() -> None:
    steps = [step(0.0, 1.0, used=8), step(1.0, 1.5, used=2)]
    result = summarise(recorded(TWO, steps))
    assert result["kv_utilisation"] == pytest.approx((1.0 * 8 + 0.5 * 2) / (1.5 * 10))
    assert result["kv_waste"] == pytest.approx((1.0 * 1 + 0.5 * 1) / (1.0 * 32 + 0.5 * 8))


def test_recompute_tax_and_prefix_hits() -> None:
    steps = [step(0.0, 1.0, num_tokens=30, num_recomputed_tokens=3), step(1.0, 2.0, num_tokens=10)]
    records = [request("a", 0.0, [0.5]), request("b", 0.0, [0.5])]
    records[0].num_cached_tokens = 5
    never_ran = RequestRecord("c", 0.0, 1000, finish_reason="error")
    result = summarise(recorded([*records, never_ran], steps))
    assert result["recompute_tax"] == pytest.approx(4 / 40)
    assert result["prefix_hit_rate"] == pytest.approx(5 / 20)
    assert (result["prefix_hit_tokens"], result["prefix_queried_tokens"]) == (5, 20)
    assert dict(overview(result))["prefix hits"] == "25.0 % of 20 prompt tokens"


def test_a_deadline_is_met_by_the_last_token_of_a_completed_request() -> None:
    records = [request("a", 0.0, [0.5, 1.0]), request("b", 0.0, [0.5, 1.5]), request("c", 0.0, [0.5])]
    refused = RequestRecord("d", 0.0, 8, finish_reason="error")
    for record in (*records[:2], refused):
        record.deadline = 1.0
    assert [record.is_in_time for record in (*records, refused)] == [True, False, True, False]
    assert summarise(recorded([*records, refused]))["deadlines_met"] == pytest.approx(1 / 3)
    assert summarise(recorded(records[2:]))["deadlines_met"] is None


STEPS = [step(0.10, 0.50), step(0.30, 0.90), step(0.70, 1.30, idle=0.40)]


@pytest.mark.parametrize(("device", "each"), [("cpu", 0.01 + 0.02), ("cuda", 0.01 + 0.05 + 0.02)])
def test_host_time_is_that_of_planning_launching_and_landing(device: str, each: float) -> None:
    """Also behind a step in flight; on a CPU the launch is the computation. Waiting for results never counts."""
    assert host_seconds(STEPS, device) == pytest.approx(3 * each)
    assert summarise(recorded(TWO, STEPS), device=device)["host_us_per_step"] == pytest.approx(each * 1e6)


def test_the_gpu_idles_when_it_works_on_no_step() -> None:
    assert summarise(recorded(TWO, STEPS), device="cuda")["gpu_idle"] is None, "nobody told"
    told = [replace(one, device_seconds=seconds) for one, seconds in zip(STEPS, (0.0, 0.7, 0.5), strict=True)]
    assert summarise(recorded(TWO, told, 2.0), device="cuda")["gpu_idle"] == pytest.approx(1 - 1.2 / 2)
    assert summarise(recorded(TWO, told, 1.0), device="cuda")["gpu_idle"] == 0.0, "a step from before the run"


def test_keys_are_those_that_vllm_writes() -> None:
    result = summarise(recorded(TWO))
    expected = {
        f"{s}_{m}_ms"
        for s in ("mean", "median", "std", "p50", "p90", "p95", "p99")
        for m in ("ttft", "tpot", "itl", "e2el")
    }
    expected |= {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "schema_version"}
    expected |= {"request_throughput", "output_throughput", "total_token_throughput", "request_goodput"}
    assert expected <= result.keys()
