"""Whole served workloads over a fake executor: the folder, the numbers, the table, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmkit.errors import ConfigError
from llmkit.registry import Registry
from llmkit.types import SamplingParams, StepPlan
from llmkit.workload import catalog
from llmkit.workload.protocol import ModelBounds, RunContext, RunOutcome
from llmkit.workload.requests import TimedRequest
from llmkit.workload.served import ServedWorkload
from llmkit.workload.trace import write_trace
from tests.workload.harness import FakeTarget, fake_target


def make(name: str, **options: Any) -> ServedWorkload:
    registry = Registry()
    catalog.llmkit_register(registry)
    component = registry.get("workload", name)
    workload: ServedWorkload = component.load()(component.settings.model_validate(options))
    return workload


def run(
    workload: ServedWorkload, folder: Path, target: FakeTarget | None = None, **context: Any
) -> tuple[RunOutcome, str]:
    text = io.StringIO()
    console = Console(file=text, width=100)
    outcome = workload.run(target or fake_target(), RunContext(folder, console=console, **context))
    return outcome, text.getvalue()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


SMALL = {"num_requests": 6, "prompt_len": [2, 9], "max_tokens": [2, 5]}


def test_the_folder_is_complete_and_consistent(tmp_path: Path) -> None:
    outcome, text = run(
        make("poisson", rate=20.0, goodput_ttft_ms=50, **SMALL),
        tmp_path / "new" / "run",
        config_text="scheduler: continuous\n",
        labels={"model": "fake"},
        overrides=("workload.rate=20",),
        seed=3,
    )
    folder = tmp_path / "new" / "run"
    result = json.loads((folder / "result.json").read_text())
    assert result == json.loads(json.dumps(outcome.result))
    assert (folder / "config.yaml").read_text() == "scheduler: continuous\n"
    rows, steps = lines(folder / "requests.jsonl"), lines(folder / "steps.jsonl")
    assert len(rows) == result["completed"] == result["num_prompts"] == 6
    assert len(steps) == result["num_steps"]
    assert sum(row["num_output_tokens"] for row in rows) == result["total_output_tokens"]
    assert sum(step["num_new_tokens"] for step in steps) == result["total_output_tokens"]
    assert sum(row["ttft_ms"] for row in rows) / 6 == pytest.approx(result["mean_ttft_ms"])
    for row in rows:
        assert row["ttft_ms"] + sum(row["itl_ms"]) == pytest.approx(row["e2el_ms"], abs=0.01)
        assert 0 < row["arrival_time"] <= row["first_scheduled_time"] < row["finished_time"]
    assert max(row["arrival_time"] for row in rows) == pytest.approx(6 / 20)
    with gzip.open(folder / "trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    assert result["request_goodput"] is not None
    assert result["environment"]["overrides"] == ["workload.rate=20"]
    assert result["environment"]["seed"] == 3
    assert result["workload"]["name"] == "poisson"
    assert result["request_rate"] == 20.0
    assert all(path.is_file() for path in outcome.files)
    assert "output throughput" in text
    assert "model=fake" in text


def test_deadlines_are_counted_and_written_from_the_start_of_the_run(tmp_path: Path) -> None:
    target = fake_target()
    target.engine.clock.sleep_until(100.0)
    outcome, text = run(make("deadlines", rate=20.0, deadline_seconds=[0.0, 0.1], **SMALL), tmp_path, target)
    rows = lines(tmp_path / "requests.jsonl")
    assert all(0 <= row["deadline"] - row["arrival_time"] <= 0.1 for row in rows)
    ends = [row["arrival_time"] + row["e2el_ms"] / 1e3 for row in rows]
    met = sum(end <= row["deadline"] for end, row in zip(ends, rows, strict=True))
    assert 0 < met < 6 and outcome.result["deadlines_met"] == met / 6
    assert "deadlines met" in text


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    run(make("batch", **SMALL), tmp_path, labels={"model": "<script>"})
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "model=&lt;script&gt;" in page
    assert "<td>overrides</td><td></td>" in page, "a list is shown in Python's own notation"
    assert "data:image/png;base64,iVBOR" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("options", [{"rate": 5.0}, {"rate": float("inf")}])
def test_gamma_and_infinite_rate_are_written_as_json(tmp_path: Path, options: dict[str, float]) -> None:
    outcome, _ = run(make("gamma", burstiness=0.3, **options, **SMALL), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["burstiness"] == 0.3
    assert result["request_rate"] in (5.0, "inf")
    assert outcome.result["completed"] == 6


def test_a_trace_is_played_and_its_bad_requests_fail_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, [TimedRequest(0.0, (1, 2), 2), TimedRequest(0.1, (999,), 2), TimedRequest(0.2, (3,), 2)])
    outcome, text = run(make("trace", path=str(path)), tmp_path / "run")
    assert (outcome.result["completed"], outcome.result["failed"]) == (2, 1)
    assert "refused: token id 999" in text
    errors = [row["error"] for row in lines(tmp_path / "run" / "requests.jsonl")]
    assert sum(error is not None for error in errors) == 1


def test_end_of_text_ends_a_request_only_if_asked_to(tmp_path: Path) -> None:
    def play(ignore_eos: bool) -> int:
        target = fake_target(vocab_size=5)
        target.engine.limits = type(target.engine.limits)(5, 256, frozenset({0, 1, 2}))
        outcome, _ = run(make("batch", ignore_eos=ignore_eos, max_tokens=20, num_requests=3), tmp_path, target)
        total: int = outcome.result["total_output_tokens"]
        return total

    assert play(ignore_eos=True) == 60
    assert play(ignore_eos=False) < 60


def test_ctrl_c_writes_partial_results(tmp_path: Path) -> None:
    def cost(plan: StepPlan) -> float:
        if plan.step_id == 5:
            raise KeyboardInterrupt
        return 1.0

    workload = make("batch", warm_up=False, num_requests=4, prompt_len=4, max_tokens=[[0, 2], [1, 30]], seed=1)
    outcome, text = run(workload, tmp_path, fake_target(cost=cost))
    result = json.loads((tmp_path / "result.json").read_text())
    assert outcome.interrupted
    assert result["interrupted"]
    assert result["num_prompts"] == 4
    assert 0 < result["aborted"] < 4
    assert result["completed"] + result["aborted"] == 4
    assert "interrupted" in text


def test_ctrl_c_while_warming_up_writes_an_empty_result(tmp_path: Path) -> None:
    def cost(plan: StepPlan) -> float:
        raise KeyboardInterrupt

    outcome, _ = run(make("batch", **SMALL), tmp_path, fake_target(cost=cost))
    assert outcome.interrupted
    assert json.loads((tmp_path / "result.json").read_text())["completed"] == 0


def test_a_fault_of_the_engine_is_raised_after_writing(tmp_path: Path) -> None:
    def cost(plan: StepPlan) -> float:
        if plan.step_id == 3:
            raise AssertionError("slots disagree")
        return 1.0

    with pytest.raises(AssertionError, match="slots disagree"):
        run(make("batch", warm_up=False, **SMALL), tmp_path, fake_target(cost=cost))
    assert json.loads((tmp_path / "result.json").read_text())["interrupted"]
    assert len(lines(tmp_path / "steps.jsonl")) == 3


def test_several_samples_of_a_prompt_are_refused_not_dropped(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.n=3: workload batch draws one sample of each prompt; "):
        run(make("batch", **SMALL), tmp_path, sampling=SamplingParams(n=3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(catalog.NAMED))
def test_a_named_workload_refuses_a_model_it_was_not_made_for(tmp_path: Path, name: str) -> None:
    workload = make(name)
    with pytest.raises(ConfigError, match=f"workload {name} (needs sequences|uses token ids)"):
        run(workload, tmp_path)
    assert not list(tmp_path.iterdir())
    requests = workload.build(ModelBounds(vocab_size=10_001, max_model_len=8200))
    assert len(requests) >= 1


@pytest.mark.parametrize("warm", [True, False])
def test_warming_up_is_short_and_not_measured(tmp_path: Path, warm: bool) -> None:
    plans: list[StepPlan] = []

    def cost(plan: StepPlan) -> float:
        plans.append(plan)
        return 1.0

    outcome, _ = run(make("batch", warm_up=warm, num_requests=20, prompt_len=30), tmp_path, fake_target(cost=cost))
    measured = [plan for plan in plans if plan.scheduled[0].request_id.startswith("w")]
    assert outcome.result["num_steps"] == len(measured)
    assert outcome.result["duration"] == len(measured)
    warming = [plan for plan in plans if plan not in measured]
    assert all(set(admission.token_ids) == {0} for plan in warming for admission in plan.admissions)
    # 64 tokens fit a step: prompts of 30, 30 and 30 make one and a half of them, three more tokens follow
    assert (len(warming), sum(len(plan.admissions) for plan in warming)) == ((5, 3) if warm else (0, 0))


def test_sampling_of_the_context_is_used(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.7, top_k=5)
    outcome, _ = run(make("batch", **SMALL), tmp_path, sampling=params)
    assert outcome.result["sampling"] == {"temperature": 0.7, "top_k": 5}


def test_prefix_hits_are_counted(tmp_path: Path) -> None:
    """Eight requests share ten tokens, two of four blocks; each comes when the one before it is done."""
    options = {"num_requests": 8, "prompt_len": 3, "max_tokens": 2, "prefix_groups": 1, "prefix_len": 10}
    outcome, text = run(make("poisson", rate=0.01, **options), tmp_path)
    result = outcome.result
    assert (result["prefix_hit_tokens"], result["prefix_queried_tokens"]) == (7 * 8, 8 * 13)
    assert result["prefix_hit_rate"] == 56 / 104 and "53.8 % of 104 prompt tokens" in text
    steps = lines(tmp_path / "steps.jsonl")
    assert steps[-1]["num_cached_blocks"] > steps[0]["num_cached_blocks"]
